"""Scale on paper, against values worked out by hand."""

import json
import math

import pytest

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DONE
from launcher import cluster, link, pod, scale
from launcher.__main__ import main
from launcher.membership import Member, Order
from launcher.scale import Run, figures, goodput, limits

FOUR = Run(4)


def of(run: Run) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures(run)}


def test_four_nodes_by_hand() -> None:
    values = of(FOUR)
    assert values["pods"] == values["worker processes"] == 4
    assert values["API writes to start and end"] == 52
    assert values["pods created and bound"] == pytest.approx(4 / 50)
    assert values["rendezvous"] == pytest.approx(0.3 + 4 * 69e-6)
    assert values["rendezvous store"] == pytest.approx(4 * (20 + 2 / (0.1 + 4 * 69e-6)))
    assert values["orders leaving pod 0"] == pytest.approx(10 * 16 * 73)
    assert values["bytes read"] == pytest.approx(4 * 100 * 208_000)
    assert values["reads of the store"] == pytest.approx(83.2e6 / 8_388_608)
    assert values["checkpoint"] == 120e6
    assert values["objects of it"] == 9
    assert values["stall for it"] == pytest.approx(30e6 * 0.13 / 600e6)
    assert values["upload of it"] == pytest.approx(30e6 / 1.25e9)
    assert values["interval"] == 60
    assert values["checkpoint bandwidth"] == 2e6
    assert values["between failures"] == pytest.approx(86_400 / 0.02)
    assert values["pods lost"] == pytest.approx(0.14)


def test_many_nodes_wait_for_the_controller_rather_than_the_scheduler() -> None:
    assert of(Run(1030))["pods created and bound"] == pytest.approx(50)


def test_goodput_by_hand() -> None:
    # 1,000 nodes, one failure a node and 100 days: one in 8,640 s. Interval 600 s, recovery 60 s, no stall to speak of
    run = Run(1000, params=1, failures_per_node_day=0.01, checkpoint_seconds=600, recovery_seconds=60)
    expected = 600 / (8640 * math.exp(60 / 8640) * (math.exp(600 / 8640) - 1))
    assert goodput(run) == pytest.approx(expected, rel=1e-6)
    assert goodput(run) == pytest.approx(1 - (600 / 2 + 60) / 8640, abs=0.002), "the first order of it"


def test_without_failures_only_the_stall_is_lost() -> None:
    run = Run(2, params=1.2e9, failures_per_node_day=0, checkpoint_seconds=300)
    stall = 1.2e9 * 12 / 2 * 0.13 / 600e6
    assert stall == pytest.approx(1.56)
    assert goodput(run) == pytest.approx(300 / 301.56)
    assert of(run)["best interval"] == math.inf


def test_the_interval_is_no_shorter_than_an_upload_or_a_hundred_stalls() -> None:
    assert of(Run(1, params=1e9, checkpoint_seconds=60))["interval"] == pytest.approx(100 * 12e9 * 0.13 / 600e6)
    slow = Run(64, params=1e9, checkpoint_seconds=60, storage_bytes_per_second=1e8)
    assert of(slow)["interval"] == pytest.approx(120)


def test_the_best_interval_is_youngs() -> None:
    run = Run(100, params=1e9, failures_per_node_day=0.01)
    stall = 12e9 / 100 * 0.13 / 600e6
    assert of(run)["best interval"] == pytest.approx(math.sqrt(2 * stall * 86_400))


def test_a_hopeless_failure_rate_has_no_goodput_instead_of_an_overflow() -> None:
    assert goodput(Run(1_000_000, failures_per_node_day=1000)) == 0


def reached(run: Run) -> dict[str, int | None]:
    return {limit.name: limit.reached_at for limit in limits(run)}


def test_limits_by_hand() -> None:
    at = reached(Run(8, procs_per_node=4, global_batch=1024))
    assert at["two samples a process and step"] == 129, "128 x 4 x 2 = 1,024 is fine"
    assert at["pods whose logs the launcher shows"] == 65
    assert at["orders over the link of pod 0"] == math.floor(math.sqrt(1.25e9 / 730)) + 1
    assert at["a round of the membership, against half of --node-timeout"] == math.floor(5 / 69e-6) + 1
    assert at["reads of the store, one prefix"] == math.floor(5500 * 8_388_608 / (4 * 100 * 208_000)) + 1
    assert at["bytes from the store"] == math.floor(12.5e9 / (4 * 100 * 208_000)) + 1
    assert at["objects of a checkpoint, put within a second"] == math.floor(3499 / 8) + 1
    assert at["seconds to create and bind all pods, against ten minutes"] == 600 * 20 + 30 + 1
    assert at["completions of one Job"] == 100_001


def test_limits_come_in_the_order_in_which_they_are_reached() -> None:
    found = [limit.reached_at for limit in limits(FOUR)]
    assert None not in found
    assert found == sorted(found)  # type: ignore[type-var]


def test_a_limit_is_exceeded_where_it_says_and_not_one_node_before() -> None:
    for limit in limits(FOUR):
        assert limit.reached_at is not None
        (there,) = (each for each in limits(FOUR.on(limit.reached_at)) if each.name == limit.name)
        assert there.value > there.most
        if limit.reached_at > 1:
            (before,) = (each for each in limits(FOUR.on(limit.reached_at - 1)) if each.name == limit.name)
            assert before.value <= before.most


def test_without_failures_goodput_sets_no_limit() -> None:
    assert reached(Run(4, failures_per_node_day=0))["time that does not count, against one tenth"] is None


def test_constants_are_those_of_the_code() -> None:
    assert scale.EXCHANGE_SECONDS == link.EXCHANGE_SECONDS
    assert scale.TICK_SECONDS == pod._TICK_SECONDS
    assert scale.POLL_SECONDS == cluster._POLL_SECONDS
    assert scale.FOLLOWED_PODS == cluster._MOST_FOLLOWED
    order = Order(1_790_000_000, tuple(Member(node, node, "10.100.100.100", 40_000) for node in range(1000)))
    assert len(order.to_json()) / 1000 == pytest.approx(scale.ORDER_BYTES_A_NODE, rel=0.03)


def test_the_command_prints_both_tables_and_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--nodes", "128", "--procs-per-node", "8"]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "On paper, nothing was run: 128 nodes x 8 processes" in text
    assert "REACHED" in text, "a batch of 64 is too small for 1,024 processes"
    assert (
        main(["scale", "--nodes", "128", "--procs-per-node", "8", "--failures-per-node-day", "0", "--json"])
        == EXIT_DONE
    )
    found = json.loads(capsys.readouterr().out)
    values = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert values["worker processes"] == 1024
    assert values["best interval"] is None
    assert found["run"]["nodes"] == 128


@pytest.mark.parametrize(
    "words", [("--nodes", "0"), ("--nodes", "2", "--params", "-1"), ("--nodes", "2", "--days", "inf")]
)
def test_a_number_that_makes_no_sense_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *words]) == EXIT_ASKED_WRONGLY
    assert "must be" in capsys.readouterr().err
