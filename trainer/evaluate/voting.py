"""Voting: a classifier judges scaled copies of each cloud, and their class probabilities are averaged (PointCMT's test).

The published test repeats this 300 times and reports the best repetition, which no single model reaches. Here the plain
accuracy, the repetitions' mean and deviation, and the best one stand side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from trainer.augment import uniform

Classify = Callable[[Float32[Tensor, "b n 3"]], Float[Tensor, "b k"]]
"""Logits from points; an objective's `classify` in eval mode."""

NUM_VOTES: Final = 10
NUM_REPETITIONS: Final = 300
SCALE_RANGE: Final = (0.85, 1.15)


@dataclass(frozen=True)
class VotingScores:
    """Shares of clouds named rightly, and means of the classes' own shares."""

    accuracy: float  # without voting
    class_mean_accuracy: float
    repetitions: tuple[float, ...]  # accuracy of each
    class_mean_repetitions: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the repetitions' accuracies."""
        return float(torch.tensor(self.repetitions, dtype=torch.float64).mean())

    @property
    def deviation(self) -> float:
        """Of the repetitions' accuracies, as an estimate from them; zero of one."""
        return float(
            torch.tensor(self.repetitions, dtype=torch.float64).std(correction=min(1, len(self.repetitions) - 1))
        )

    @property
    def best(self) -> float:
        """The figure that the paper's script reports: chosen on the test split."""
        return max(self.repetitions)


@torch.no_grad()
def vote(
    classify: Classify,
    points: Float32[Tensor, "b n 3"],
    seeds: Int64[Tensor, " b"],
    *,
    num_votes: int = NUM_VOTES,
    scale_range: tuple[float, float] = SCALE_RANGE,
    compounding: bool = True,
) -> Float32[Tensor, "b k"]:
    """Class probabilities of each cloud, the mean over the cloud as it is and scaled copies of it.

    Every axis of every copy has a factor of its own. With `compounding`, as in the official code, each copy is made from
    the one before, so that the last carries the product of all factors; without, each is made from the cloud.
    """
    total = classify(points).float().softmax(dim=1)
    low, high = scale_range
    random = uniform(seeds, 3 * (num_votes - 1), "voting").view(len(points), num_votes - 1, 3)
    factors = low + (high - low) * random
    if compounding:
        factors = factors.cumprod(dim=1)
    for copy in factors.unbind(dim=1):
        total = total + classify(points * copy[:, None]).float().softmax(dim=1)
    return total / num_votes


@torch.no_grad()
def voting_scores(
    classify: Classify,
    points: Float32[Tensor, "b n 3"],
    labels: Int64[Tensor, " b"],
    *,
    seed: int = 0,
    num_repetitions: int = NUM_REPETITIONS,
    num_votes: int = NUM_VOTES,
    scale_range: tuple[float, float] = SCALE_RANGE,
    compounding: bool = True,
    batch_size: int = 64,
) -> VotingScores:
    """The scores with and without voting; clouds draw their factors by seed, repetition and place among the clouds."""
    places = torch.arange(len(points), device=points.device)
    batches = list(zip(points.split(batch_size), places.split(batch_size), strict=True))
    plain = torch.cat([classify(cloud).argmax(dim=1) for cloud, _ in batches])
    voted = []
    for repetition in range(num_repetitions):
        first = (seed * num_repetitions + repetition) * len(points)
        voted.append(
            torch.cat(
                [
                    vote(
                        classify,
                        cloud,
                        first + place,
                        num_votes=num_votes,
                        scale_range=scale_range,
                        compounding=compounding,
                    ).argmax(dim=1)
                    for cloud, place in batches
                ]
            )
        )
    repeated = [_accuracies(predicted, labels) for predicted in voted]
    return VotingScores(
        *_accuracies(plain, labels),
        repetitions=tuple(accuracy for accuracy, _ in repeated),
        class_mean_repetitions=tuple(class_mean for _, class_mean in repeated),
    )


def _accuracies(predicted: Int64[Tensor, " b"], labels: Int64[Tensor, " b"]) -> tuple[float, float]:
    """The share that is right, and the mean over the classes that occur of their own shares."""
    right = predicted == labels
    by_class = [right[labels == label].double().mean() for label in labels.unique()]
    return float(right.double().mean()), float(torch.stack(by_class).mean())
