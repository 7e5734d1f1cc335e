"""Tests of trainer/evaluate/voting.py."""

import pytest
import torch
from torch import Tensor

from trainer.evaluate.voting import VotingScores, vote, voting_scores

SEEDS = torch.arange(5)


def clouds(b: int = 5, n: int = 12) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0))


def classify(points: Tensor) -> Tensor:
    """Three classes, by which axis a cloud extends along."""
    return 4 * points.std(dim=1)


class Seen:
    """A classifier that remembers what it was shown."""

    def __init__(self) -> None:
        self.clouds: list[Tensor] = []

    def __call__(self, points: Tensor) -> Tensor:
        self.clouds.append(points)
        return classify(points)

    def factors(self) -> Tensor:
        """Of each vote, cloud and axis."""
        ratios = torch.stack(self.clouds) / self.clouds[0]
        torch.testing.assert_close(ratios, ratios[:, :, :1].expand_as(ratios))
        return ratios[:, :, 0]


def test_probabilities_are_the_mean_over_the_votes() -> None:
    seen = Seen()
    voted = vote(seen, clouds(), SEEDS, num_votes=4)
    assert len(seen.clouds) == 4 and torch.equal(seen.clouds[0], clouds())
    torch.testing.assert_close(voted, torch.stack([classify(each).softmax(dim=1) for each in seen.clouds]).mean(dim=0))
    torch.testing.assert_close(voted.sum(dim=1), torch.ones(5))


def test_factors_compound_as_in_the_official_code_or_stand_alone() -> None:
    compound, alone = Seen(), Seen()
    vote(compound, clouds(), SEEDS)
    vote(alone, clouds(), SEEDS, compounding=False)
    single = alone.factors()
    assert single.shape == (10, 5, 3) and (single[0] == 1).all()
    assert single.min() >= 0.85 - 1e-5 and single.max() <= 1.15 + 1e-5
    assert single[1:].flatten().unique().numel() == 9 * 5 * 3
    torch.testing.assert_close(compound.factors(), single.cumprod(dim=0))


def test_a_cloud_is_voted_on_alike_in_any_batch() -> None:
    whole = vote(classify, clouds(), SEEDS)
    torch.testing.assert_close(vote(classify, clouds()[[3, 1]], SEEDS[[3, 1]]), whole[[3, 1]])


def test_one_vote_is_the_plain_prediction() -> None:
    torch.testing.assert_close(vote(classify, clouds(), SEEDS, num_votes=1), classify(clouds()).softmax(dim=1))


def test_scores_stand_beside_those_without_voting() -> None:
    labels = classify(clouds()).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3  # one cloud is named wrongly
    scores = voting_scores(classify, clouds(), labels, num_repetitions=6, batch_size=2)
    assert scores.accuracy == pytest.approx(0.8)
    shares = [
        float((classify(clouds()).argmax(dim=1) == labels)[labels == each].float().mean()) for each in labels.unique()
    ]
    assert scores.class_mean_accuracy == pytest.approx(sum(shares) / len(shares))
    assert len(scores.repetitions) == len(scores.class_mean_repetitions) == 6
    assert scores.best == max(scores.repetitions) and scores.mean == pytest.approx(sum(scores.repetitions) / 6)
    assert voting_scores(classify, clouds(), labels, num_repetitions=6, batch_size=5) == scores


def test_repetitions_draw_other_factors_and_another_seed_too() -> None:
    seen = Seen()
    voting_scores(seen, clouds(), torch.zeros(5, dtype=torch.int64), num_repetitions=2, num_votes=2, seed=1)
    # the plain test, then of each repetition the plain vote and a scaled one
    first, second = seen.clouds[2], seen.clouds[4]
    assert not torch.isclose(first, second).all(dim=2).any()


def test_the_deviation_of_one_repetition_is_zero() -> None:
    assert VotingScores(0.5, 0.5, (0.5,), (0.5,)).deviation == 0.0
    assert VotingScores(0.5, 0.5, (0.25, 0.75), (0.5, 0.5)).deviation == pytest.approx(0.125**0.5)
