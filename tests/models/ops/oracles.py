"""What point operations must return, computed the slow and obvious way in numpy, and clouds that are hard on them."""

import numpy as np
import torch
from torch import Tensor


def clouds() -> dict[str, Tensor]:
    """Random and degenerate batches of clouds by name, 3 coordinates each."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    return {
        "random": random(3, 150, 3),
        "around the origin": torch.randn(2, 120, 3, generator=generator) * 0.03,
        "one point": random(2, 1, 3),
        "two points": random(2, 2, 3),
        "all points equal": random(2, 1, 3).expand(2, 60, 3).contiguous(),
        "every point many times": random(2, 12, 3)[:, torch.randint(0, 12, (120,), generator=generator)],
        "mostly one point": torch.cat([random(2, 1, 3).expand(2, 90, 3), random(2, 40, 3)], dim=1),
        "on a grid": torch.randint(0, 4, (2, 100, 3), generator=generator).float(),
        "far from the origin": random(2, 100, 3) + 1e4,
        "too large to square": torch.randn(2, 60, 3, generator=generator) * 1e25,
        "too small to square": torch.randn(2, 60, 3, generator=generator) * 1e-25,
        "one far away": torch.cat([random(2, 80, 3) * 1e-3, torch.full((2, 1, 3), 1e4)], dim=1),
        "many small clouds": random(70, 8, 3),
    }


def squared_distances(queries: Tensor, points: Tensor) -> np.ndarray:
    """[b, m, n], neighbouring axes summed in pairs until one sum is left."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.square(queries.numpy()[:, :, None] - points.numpy()[:, None])
        while terms.shape[-1] > 1:
            if terms.shape[-1] % 2:
                terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
            terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A stable sort of every row."""
    squared = squared_distances(queries, points)
    order = squared.argsort(axis=-1, kind="stable")[..., :k]
    return torch.from_numpy(order), torch.from_numpy(np.take_along_axis(squared, order, axis=-1))


def ball_query(centres: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """Point after point."""
    squared = squared_distances(centres, points)
    result = np.empty((*squared.shape[:2], k), np.int64)
    for place in np.ndindex(*squared.shape[:2]):
        within = [i for i, distance in enumerate(squared[place]) if distance < np.float32(radius**2)]
        within = (within or [int(squared[place].argmin())])[:k]
        result[place] = within + within[:1] * (k - len(within))
    return torch.from_numpy(result)


def farthest_points(points: Tensor, num_samples: int, start: Tensor, origin_last: bool = False) -> Tensor:
    """Cloud after cloud, from all distances."""
    result = []
    norms = squared_distances(torch.zeros_like(points[:, :1]), points)[:, 0]
    for squared, squared_norms, first in zip(squared_distances(points, points), norms, start.tolist(), strict=True):
        chosen = [first]
        while len(chosen) < num_samples:
            nearest = squared[chosen].min(axis=0)
            if origin_last:
                nearest[squared_norms.astype(np.float64) <= 1e-3] = -0.5
            nearest[chosen] = -1
            chosen.append(int(nearest.argmax()))
        result.append(chosen)
    return torch.tensor(result)
