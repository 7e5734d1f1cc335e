"""How far two clouds are apart: chamfer distances, and the earth mover's distance under a matching of their points."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.ops.checks import check_clouds, check_no_nan, check_same_clouds
from models.ops.neighbours import gather, nearest_neighbours
from models.ops.reference import squared_distances

_AVOIDS_INFINITE_SLOPE = 1e-12  # added under the root of a squared distance


def chamfer_distance(
    a: Float[Tensor, "b n 3"], b: Float[Tensor, "b m 3"], *, squared: bool = True
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
    """From each point of a to the nearest of b, and from each of b to the nearest of a: squared distances, or their roots.

    Gradients flow to both ends of every pair found; which pairs they are is constant.
    """
    check_clouds("a", a)
    check_clouds("b", b)
    check_same_clouds("a", a, "b", b)
    check_no_nan(a=a, b=b)
    distances = []
    for source, other in ((a, b), (b, a)):
        partners = gather(other, nearest_neighbours(source, other, 1).indices.squeeze(-1))
        between = (source - partners).square().sum(dim=-1)
        distances.append(between if squared else (between + _AVOIDS_INFINITE_SLOPE).sqrt())
    return distances[0], distances[1]


def earth_movers_distance(
    predicted: Float[Tensor, "b n 3"], target: Float[Tensor, "b n 3"], *, epsilon: float = 0.05, max_rounds: int = 3000
) -> Float[Tensor, " b"]:
    """Each cloud's mean distance from predicted points to the target points matched to them (PointCMT's FE and CMPG).

    The matching comes from an auction and costs at most `epsilon` more than the best in the mean. It is constant in the
    backward pass, and gradients reach the prediction only.
    """
    matching = match_by_auction(predicted, target, epsilon=epsilon, max_rounds=max_rounds)
    return matched_distance(predicted, target, matching)


def matched_distance(
    predicted: Float[Tensor, "b n 3"], target: Float[Tensor, "b n 3"], matching: Int64[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Each cloud's mean distance from predicted point i to target point matching[i], with gradients for the prediction."""
    partners = gather(target.detach(), matching)
    squared = (predicted.float() - partners.float()).square().sum(dim=-1)
    return (squared + _AVOIDS_INFINITE_SLOPE).sqrt().mean(dim=-1)


def exact_assignment(predicted: Float[Tensor, "b n 3"], target: Float[Tensor, "b n 3"]) -> Int64[Tensor, "b n"]:
    """The matching of least total distance, on the CPU in cubic time: for tests and small clouds."""
    from scipy.optimize import linear_sum_assignment

    costs = torch.cdist(predicted.detach().double().cpu(), target.detach().double().cpu()).numpy()
    matchings = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs]
    return torch.stack(matchings).to(predicted.device)


def match_by_auction(
    predicted: Float[Tensor, "b n 3"],
    target: Float[Tensor, "b n 3"],
    *,
    epsilon: float = 0.05,
    max_rounds: int = 3000,
) -> Int64[Tensor, "b n"]:
    """For each predicted point a target point of its own; their mean distance exceeds the best by at most `epsilon`.

    Points still without a partner after `max_rounds` take the one they would bid for next, which then has two.
    Differs from PointCMT's kernel: it stops as soon as all points are matched, and its result is the same every time.
    """
    check_clouds("predicted", predicted)
    check_clouds("target", target)
    check_same_clouds("predicted", predicted, "target", target)
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted is {tuple(predicted.shape)} and target is {tuple(target.shape)}: an exchange of points needs as many on both sides."
        )
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; expected more than 0, the least that a bid raises a price by.")
    matching: Tensor = _match_by_auction(predicted.detach().float(), target.detach().float(), epsilon, max_rounds)
    return matching


@torch.library.custom_op("viewpoint::match_by_auction", mutates_args=())
def _match_by_auction(predicted: Tensor, target: Tensor, epsilon: float, max_rounds: int) -> Tensor:
    """All rows of all clouds without a partner bid at once, each round; names of rows and columns count through clouds."""
    check_no_nan(predicted=predicted, target=target)
    num_clouds, num_points, _ = predicted.shape
    total = num_clouds * num_points
    costs = squared_distances(predicted, target).sqrt_().flatten(0, 1)
    prices = costs.new_zeros(num_clouds, num_points)
    column_of = torch.full((total,), -1, device=costs.device)
    row_of = torch.full((total,), total, device=costs.device)
    for _ in range(max_rounds):
        rows = (column_of < 0).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        clouds = rows // num_points
        best, columns, second = _two_smallest(costs[rows] + prices[clouds])
        columns = columns + clouds * num_points
        bids = prices.view(-1)[columns] + (second - best) + epsilon
        # each column goes to its highest bid; of equal bids the lowest row wins
        highest = torch.full_like(prices, -torch.inf).view(-1).scatter_reduce_(0, columns, bids, "amax")
        is_highest = bids == highest[columns]
        rows, columns = rows[is_highest], columns[is_highest]
        winners = torch.full_like(row_of, total).scatter_reduce_(0, columns, rows, "amin")
        sold = winners < total
        evicted = row_of[sold & (row_of < total)]
        column_of[evicted] = -1
        sold_columns = sold.nonzero().squeeze(1)
        row_of[sold_columns] = winners[sold_columns]
        column_of[winners[sold_columns]] = sold_columns
        prices.view(-1)[sold_columns] = highest[sold_columns]
    rows = (column_of < 0).nonzero().squeeze(1)
    clouds = rows // num_points
    column_of[rows] = (costs[rows] + prices[clouds]).argmin(dim=1) + clouds * num_points
    return column_of.view(num_clouds, num_points) % num_points


@_match_by_auction.register_fake
def _(predicted: Tensor, target: Tensor, epsilon: float, max_rounds: int) -> Tensor:
    return predicted.new_empty(predicted.shape[:2], dtype=torch.int64)


def _two_smallest(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its least entry, where that is, and the next; the least again where a row has one entry."""
    if values.shape[1] == 1:
        return values[:, 0], torch.zeros(len(values), dtype=torch.int64, device=values.device), values[:, 0]
    columns = values.argmin(dim=1, keepdim=True)
    best = values.gather(1, columns)
    second = values.scatter(1, columns, torch.inf).amin(dim=1)
    return best.squeeze(1), columns.squeeze(1), second
