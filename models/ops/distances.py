"""How far two clouds are apart: chamfer distances, and the earth mover's distance under a matching of their points."""

from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.ops.checks import check_clouds, check_no_nan, check_same_clouds
from models.ops.neighbours import gather, nearest_neighbours
from models.ops.opaque import opaque
from models.ops.reference import squared_distances

_AVOIDS_INFINITE_SLOPE: Final = 1e-12  # added under the root of a squared distance
_BIDS_AT_A_TIME: Final = 1 << 20  # sums of cost and price in memory


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
    a, b = _in_full_precision(a), _in_full_precision(b)
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
    partners = gather(_in_full_precision(target.detach()), matching)
    squared = (_in_full_precision(predicted) - partners).square().sum(dim=-1)
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


@opaque(
    "match_by_auction(Tensor predicted, Tensor target, float epsilon, int max_rounds) -> Tensor",
    like=lambda predicted, target, epsilon, max_rounds: predicted.new_empty(predicted.shape[:2], dtype=torch.int64),
)
def _match_by_auction(predicted: Tensor, target: Tensor, epsilon: float, max_rounds: int) -> Tensor:
    """All rows of all clouds without a partner bid at once, each round; names of rows and columns count through clouds."""
    check_no_nan(predicted=predicted, target=target)
    num_clouds, num_points, _ = predicted.shape
    nobody = num_clouds * num_points
    costs = predicted.new_empty(nobody, num_points)
    for cloud, its_costs in enumerate(
        costs.split(num_points)
    ):  # one by one: what a cloud needs on the way stays in cache
        torch.sqrt(squared_distances(predicted[cloud : cloud + 1], target[cloud : cloud + 1])[0], out=its_costs)
    prices = costs.new_zeros(num_clouds, num_points)
    column_of, row_of, winner_of = (torch.full((nobody,), nobody, device=costs.device) for _ in range(3))
    rows = torch.arange(nobody, device=costs.device)  # those without a partner
    for _ in range(max_rounds):
        if len(rows) == 0:
            break
        columns, least, next_least = _offers(costs, prices, rows)
        bids = prices.view(-1)[columns] + (next_least - least) + epsilon
        # A column goes to its highest bid, which is its new price; of equal bids to that of the lowest row
        prices.view(-1).scatter_reduce_(0, columns, bids, "amax")
        is_highest = bids == prices.view(-1)[columns]
        winner_of[columns] = nobody
        winner_of.scatter_reduce_(0, columns[is_highest], rows[is_highest], "amin")
        won = winner_of[columns] == rows
        evicted = row_of[columns[won]]
        row_of[columns[won]] = rows[won]
        column_of[rows[won]] = columns[won]
        rows = torch.cat([rows[~won], evicted[evicted < nobody]])
    if len(rows):
        column_of[rows] = _offers(costs, prices, rows)[0]
    return column_of.view(num_clouds, num_points) % num_points


def _in_full_precision(points: Tensor) -> Tensor:
    """Float32 where they were less."""
    return points.to(torch.promote_types(points.dtype, torch.float32))


def _offers(costs: Tensor, prices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the column of least cost plus price, that sum, and the next; the least again where there is one column."""
    num_points = prices.shape[1]
    found = []
    for part in rows.split(max(1, _BIDS_AT_A_TIME // num_points)):
        clouds = part // num_points
        totals = costs[part] + prices[clouds]
        least, columns = totals.min(dim=1, keepdim=True)
        next_least = totals.scatter_(1, columns, torch.inf).amin(dim=1) if num_points > 1 else least.squeeze(1)
        found.append((columns.squeeze(1) + clouds * num_points, least.squeeze(1), next_least))
    columns, least, next_least = (torch.cat(parts) for parts in zip(*found, strict=True))
    return columns, least, next_least
