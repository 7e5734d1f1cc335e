"""PointCMT's distance between clouds: the earth mover's, after each was brought to the size of a unit box."""

from typing import Final, Literal

import torch
from jaxtyping import Float, Float32
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor

from models.ops.distances import exact_assignment, match_by_auction, matched_distance

BoxNormalisation = Literal["official", "intended"]

_LEAST_EXTENT: Final = 1e-6  # the points of a smaller cloud coincide


class CloudDistanceConfig(BaseModel, extra="forbid", frozen=True):
    """How two clouds are compared. The defaults are the official code's."""

    # "official" does not centre the box, so that half of a shift stays in the distance; "intended" does
    box_normalisation: BoxNormalisation = "official"
    matching: Literal["auction", "exact"] = "auction"  # exact: on the CPU, in cubic time
    epsilon: PositiveFloat = 0.05  # what an auction's matching may cost more than the best, in the mean
    max_rounds: PositiveInt = 3000


def cloud_distance(
    predicted: Float[Tensor, "b n 3"], target: Float[Tensor, "b n 3"], config: CloudDistanceConfig
) -> Float32[Tensor, " b"]:
    """The mean distance between matched points of each pair of clouds, with gradient for the prediction only."""
    predicted = box_normalised(predicted, config.box_normalisation)
    target = box_normalised(target.detach(), config.box_normalisation)
    if config.matching == "exact":
        matching = exact_assignment(predicted, target)
    else:
        matching = match_by_auction(predicted, target, epsilon=config.epsilon, max_rounds=config.max_rounds)
    return matched_distance(predicted, target, matching)


def box_normalised(points: Float[Tensor, "b n 3"], kind: BoxNormalisation) -> Float32[Tensor, "b n 3"]:
    """The clouds with a longest extent of one: in [-1/2, 1/2] along each axis as intended.

    The official code halves the lower corner too: a centred cloud comes to lie in [-3/4, 1/4] along its longest axis,
    and a cloud moved by t moves by t/2 of its extent. Gradients flow through the extent as well.

    A cloud whose points coincide has no size to be divided by. It comes to the origin, of either kind: divided by a
    least extent, the official one would lie a hundred thousand boxes away, and no other cloud of a batch would count.
    """
    points = points.float()
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    longest = (high - low).amax(dim=2, keepdim=True)
    coincide = longest < _LEAST_EXTENT
    longest = torch.where(coincide, 1, longest)
    margin = longest - (high - low)
    centring = low - margin / 2
    corner = torch.where(coincide, centring, (low - margin) / 2) if kind == "official" else centring
    return (points - corner) / longest - 1 / 2
