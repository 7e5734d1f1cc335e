"""What every operation refuses: wrong shapes always, values only on request (`tiers.checking`)."""

import torch
from torch import Tensor

from models.ops.tiers import checks_values


def check_clouds(name: str, clouds: Tensor, num_coordinates: int | None = 3) -> None:
    """Raises unless `clouds` is [clouds, points, coordinates] with at least one point, floating."""
    expected = f"[clouds, points, {num_coordinates or 'features'}]"
    if clouds.ndim != 3 or (num_coordinates is not None and clouds.shape[-1] != num_coordinates):
        raise ValueError(f"{name} is {tuple(clouds.shape)}; expected {expected}.")
    if not clouds.is_floating_point():
        raise ValueError(f"{name} is {clouds.dtype}; expected a floating type, as {expected}.")
    if clouds.shape[1] == 0 or clouds.shape[2] == 0:
        raise ValueError(f"{name} is {tuple(clouds.shape)}: no points; expected {expected} with at least one of each.")


def check_same_clouds(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Raises unless both hold the same number of clouds on the same device."""
    if len(first) != len(second):
        raise ValueError(
            f"{first_name} is {tuple(first.shape)} and {second_name} is {tuple(second.shape)}: the first axis, clouds, must agree."
        )
    if first.device != second.device:
        raise ValueError(
            f"{first_name} is on {first.device} and {second_name} on {second.device}; move one to the other."
        )


def check_count(name: str, count: int, limit_name: str, limit: int) -> None:
    """Raises unless 1 <= count <= limit."""
    if not 1 <= count <= limit:
        raise ValueError(f"{name} is {count}; expected 1 to {limit}, the number of points of {limit_name}.")


def check_no_nan(**clouds: Tensor) -> None:
    """Raises, if checks are on, where a tensor holds NaN; says which tensor and where the first one is."""
    if not checks_values():
        return
    for name, tensor in clouds.items():
        where = torch.isnan(tensor).nonzero()
        if len(where):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} holds {len(where)} NaN, the first at {where[0].tolist()}; expected numbers."
            )


def check_indices(name: str, indices: Tensor, limit_name: str, limit: int) -> None:
    """Raises, if checks are on, unless all indices are in 0 to limit - 1."""
    if checks_values() and indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= limit):
        raise ValueError(
            f"{name} {tuple(indices.shape)} runs from {int(indices.min())} to {int(indices.max())}; expected 0 to {limit - 1}, "
            f"the points of {limit_name}."
        )
