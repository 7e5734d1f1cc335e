"""Which nodes form the world, told as stories of reports and orders."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_UNAVAILABLE
from launcher.membership import Failure, Membership, Order, Report, Rules


@dataclass
class Story:
    """A job of several nodes; agent i is on node i until another one comes."""

    rules: Rules
    now: float = 0.0
    progress: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.membership = Membership(self.rules, progress=lambda: self.progress, on_event=self.heard)
        self.reports: dict[int, Report] = {}
        self.silent: set[int] = set()

    def heard(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def join(self, *agents: int, node: int | None = None) -> None:
        for agent in agents:
            self.membership.join(agent, agent if node is None else node, "127.0.0.1", self.now)
            self.reports[agent] = Report(port=1000 + agent)

    def say(self, *agents: int, **facts: Any) -> None:
        for agent in agents:
            self.reports[agent] = Report(**{"generation": self.order.generation, "port": 1000 + agent} | facts)

    def fail(self, agent: int, cause: str = "killed", code: int = -9) -> None:
        self.say(agent, failures=(Failure(agent, code, cause),))  # type: ignore[arg-type]

    def after(self, seconds: float) -> Order:
        """Ticks ten times a second."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.1
            for agent, report in self.reports.items():
                if agent not in self.silent:
                    self.membership.hear(agent, int(self.now * 10), report, self.now)
            self.membership.tick(self.now)
        return self.order

    def run(self) -> None:
        """The members' workers run."""
        self.say(*(member.agent for member in self.order.members), phase="running")
        self.after(0.1)

    @property
    def order(self) -> Order:
        return self.membership.order

    @property
    def nodes(self) -> list[int]:
        return [member.node for member in self.order.members]


def started(**rules: Any) -> Story:
    """Three nodes whose workers run."""
    story = Story(Rules(**{"most": 3, "least": 2} | rules))
    story.join(0, 1, 2)
    story.after(0.2 if story.rules.most == 3 else story.rules.first_call_seconds + 1)
    story.run()
    assert story.nodes == [0, 1, 2]
    return story


def test_the_first_world_waits_for_all_nodes_and_after_a_minute_for_enough() -> None:
    story = Story(Rules(most=3, least=2))
    story.join(1, 0)
    assert story.after(59).generation == 0
    story.after(2)
    assert story.nodes == [0, 1], "in the order of nodes, whoever came first"
    assert story.order.generation == 1


def test_all_nodes_there_form_the_world_at_once() -> None:
    story = Story(Rules(most=3, least=2))
    story.join(2, 1, 0)
    story.after(0.1)
    assert story.nodes == [0, 1, 2]


def test_a_failed_worker_restarts_all_once_everybodys_workers_have_ended() -> None:
    story = started()
    story.fail(1)
    assert story.after(0.5).restart == "now"
    assert story.order.generation == 1, "the others' workers still run"
    story.say(0, 2)
    story.after(0.1)
    assert (story.order.generation, story.nodes, story.order.restart) == (2, [0, 1, 2], "")
    (restart,) = story.of_kind("restart")
    assert restart["cause"] == "worker_killed"
    assert "rank 1 was killed by signal 9" in restart["why"]


def test_a_killed_node_leaves_a_smaller_world_and_comes_back_into_a_larger_one_that_saves_first() -> None:
    story = started()
    story.silent.add(2)
    story.membership.gone(2, "its agent was killed")
    assert story.after(0.1).restart == "now"
    story.say(0, 1)
    story.after(0.8)
    assert story.order.generation == 1, "one more could come in the last second"
    story.after(0.4)
    assert story.nodes == [0, 1]
    story.run()
    story.join(3, node=2)
    assert story.after(0.5).restart == ""
    assert story.after(1).restart == "after_saving"
    saved = (Failure(0, EXIT_STOPPED, "saved"),)
    story.say(0, 1, failures=saved)
    story.after(0.1)
    assert story.nodes == [0, 1, 2]
    assert [event["cause"] for event in story.of_kind("restart")] == ["node_lost", "node_joined"]


def test_a_node_that_is_started_again_at_once_is_in_the_next_world() -> None:
    story = started()
    story.silent.add(0)
    story.membership.gone(0, "its agent was killed")
    story.join(3, node=0)
    story.after(0.1)
    story.say(1, 2)
    story.after(0.1)
    assert [member.agent for member in story.order.members] == [3, 1, 2]


def test_a_silent_node_is_lost_and_taken_back_when_it_speaks_again() -> None:
    story = started(silence_seconds=4.0)
    story.silent.add(2)
    assert story.after(3.5).restart == ""
    assert story.after(1).restart == "now"
    story.say(0, 1)
    story.after(1.5)
    assert story.nodes == [0, 1]
    story.run()
    story.silent.clear()
    story.say(2, generation=1)
    assert story.after(1.5).restart == "after_saving"
    assert [event["node"] for event in story.of_kind("node_joined")] == [0, 1, 2, 2]


def test_a_world_has_as_many_nodes_as_share_the_batch() -> None:
    assert [Rules(most=4, least=1, counts=(1, 2, 4)).fit(present) for present in range(6)] == [0, 1, 2, 2, 4, 4]
    assert Rules(most=4, least=3, counts=(1, 2, 4)).fit(3) == 0
    story = Story(Rules(most=4, least=1, counts=(1, 2, 4)))
    story.join(0, 1, 2, 3)
    story.after(0.1)
    story.run()
    story.silent.add(1)
    story.membership.gone(1, "its agent was killed")
    story.after(0.1)
    story.say(0, 2, 3)
    story.after(1.5)
    assert story.nodes == [0, 2], "three cannot share it"
    story.run()
    assert story.after(30).restart == "", "a third node is no reason to stop"
    story.join(4, node=1)
    assert story.after(2).restart == "after_saving"


def test_too_few_nodes_wait_and_say_so_and_give_up_after_a_while() -> None:
    story = started(least=3, patience_seconds=100.0)
    story.silent.add(2)
    story.membership.gone(2, "its agent was killed")
    story.after(0.1)
    story.say(0, 1)
    story.after(90)
    assert (story.order.generation, story.order.end) == (1, None)
    assert len(story.of_kind("waiting_for_nodes")) == 1
    story.after(20)
    assert story.order.end == EXIT_FAILED
    assert "3 nodes did not come within 100 s" in story.order.reason


def test_the_same_failure_again_and_again_without_a_new_checkpoint_ends_the_job_for_good() -> None:
    story = started(max_restarts=2, least=3)
    for _ in range(3):
        story.fail(1, "failed", 1)
        story.after(0.1)
        story.say(0, 2)
        story.after(10)
        story.run()
    assert story.order.end == EXIT_DO_NOT_RETRY
    assert "failed 3 times in a row without a new checkpoint" in story.order.reason
    assert "rank 1 failed with exit code 1" in story.order.reason


def test_failures_with_progress_between_them_go_on_for_ever() -> None:
    story = started(max_restarts=1)
    for _ in range(10):
        story.progress += 1
        story.fail(1)
        story.after(0.1)
        story.say(0, 2)
        story.after(0.2)
        story.run()
    assert story.order.end is None
    assert story.order.generation == 11


def test_without_restarts_the_first_failure_ends_the_job_and_a_retry_may_make_sense() -> None:
    story = started(max_restarts=0)
    story.fail(0, "failed", 1)
    story.after(0.1)
    story.say(1, 2)
    assert story.after(0.1).end == EXIT_FAILED


def test_a_node_that_is_told_to_leave_saves_and_the_others_go_on() -> None:
    story = started()
    story.say(2, phase="leaving", exit_code=EXIT_STOPPED)
    assert story.after(0.1).restart == "after_saving", "others may still write their part"
    saved = (Failure(0, EXIT_STOPPED, "saved"),)
    story.say(0, 1, failures=saved)
    story.after(1.5)
    assert story.nodes == [0, 1]
    assert [event["cause"] for event in story.of_kind("restart")] == ["node_left"]
    assert story.of_kind("node_lost")[0]["why"] == "it was told to stop, and saved"


def test_a_node_that_is_told_to_leave_stops_the_job_where_the_others_are_too_few() -> None:
    story = started(least=3)
    story.say(2, phase="leaving", exit_code=EXIT_STOPPED)
    story.after(0.1)
    story.say(0, 1, failures=(Failure(0, EXIT_STOPPED, "saved"),))
    assert story.after(0.1).end == EXIT_STOPPED


def test_workers_that_stop_by_themselves_stop_the_job() -> None:
    story = started()
    story.say(0, 1, 2, failures=(Failure(0, EXIT_STOPPED, "saved"),))
    assert story.after(0.1).end == EXIT_STOPPED


def test_a_worker_that_asks_for_no_retry_ends_the_job_on_all_nodes() -> None:
    story = started()
    story.say(1, phase="leaving", exit_code=EXIT_DO_NOT_RETRY)
    assert story.after(0.1).end == EXIT_DO_NOT_RETRY


def test_the_job_is_done_when_all_members_are_even_if_one_is_gone_by_then() -> None:
    story = started()
    story.say(0, 1, phase="done")
    assert story.after(1).end is None
    story.say(2, phase="done")
    story.membership.hear(2, 10**6, story.reports[2], story.now)
    story.membership.gone(2, "its agent ended")
    assert story.after(0.1).end == EXIT_DONE


def test_a_node_that_is_done_starts_again_with_one_that_failed() -> None:
    story = started()
    story.say(0, 1, phase="done")
    story.after(0.1)
    story.fail(2)
    assert story.after(0.1).restart == "now"
    story.say(0, 1)
    story.after(0.1)
    assert story.order.generation == 2


def test_a_loss_while_others_save_for_a_newcomer_ends_the_wait() -> None:
    story = started(most=4)
    story.join(3)
    assert story.after(2).restart == "after_saving"
    story.membership.gone(1, "its agent was killed")
    story.silent.add(1)
    assert story.after(0.1).restart == "now"


def test_the_hung_worker_is_blamed_and_not_those_that_lost_their_connection_to_it() -> None:
    story = started()
    story.fail(0, "failed", 1)
    story.fail(2, "hung", -9)
    story.after(0.1)
    story.say(1)
    story.after(0.1)
    (restart,) = story.of_kind("restart")
    assert (restart["cause"], restart["why"]) == ("worker_hung", "rank 2 hung")


def test_nothing_is_formed_once_the_job_was_told_to_stop() -> None:
    story = started()
    story.membership.is_stopping = True
    story.fail(0)
    assert story.after(10).generation == 1


def test_words_survive_the_wire() -> None:
    report = Report("ready", 3, 1234, (Failure(1, -9, "hung"),))
    assert Report.from_json(report.to_json()) == report
    story = started()
    assert Order.from_json(story.order.to_json()) == story.order


def test_a_node_that_left_is_waited_for_where_the_cluster_starts_it_again() -> None:
    story = started(least=3, leavers_return=True)
    story.say(2, phase="leaving", exit_code=EXIT_STOPPED)
    story.fail(0, "saved", EXIT_STOPPED)
    story.fail(1, "saved", EXIT_STOPPED)
    assert story.after(20).end is None
    story.reports.pop(2)
    story.join(3, node=2)
    assert story.after(3).generation == 2
    assert story.nodes == [0, 1, 2]


def test_a_cancelled_job_ends_when_all_have_saved() -> None:
    story = started(leavers_return=True)
    story.membership.cancel(76)
    assert story.after(0.1).restart == "after_saving"
    story.fail(0, "saved", EXIT_STOPPED)
    story.fail(1, "saved", EXIT_STOPPED)
    assert story.after(1).end is None, "node 2 saves still"
    story.fail(2, "saved", EXIT_STOPPED)
    assert story.after(0.2).end == 76


def test_a_job_that_is_done_is_not_cancelled_any_more() -> None:
    story = started()
    story.say(0, 1, 2, phase="done")
    story.membership.cancel(76)
    assert story.after(0.1).end == EXIT_DONE


def test_the_successor_of_a_lost_host_numbers_its_worlds_anew() -> None:
    heard: list[dict[str, Any]] = []
    rules = Rules(most=1, least=1)
    membership = Membership(rules, on_event=lambda kind, **facts: heard.append({"event": kind, **facts}), generation=7)
    assert membership.order.generation == 7
    membership.join(0, 0, "10.0.0.1", 0.0)
    membership.hear(0, 1, Report(generation=3, port=1), 0.0)
    assert membership.tick(0.1).generation == 8
    assert heard[-1] == {"event": "world_formed", "generation": 1, "nodes": [0]}
    assert membership.heard_within(1.0, 0.5)
    assert not membership.heard_within(1.0, 1.5)


def test_the_late_words_of_a_connection_that_was_given_up_replace_nobody() -> None:
    story = Story(Rules(most=1, least=1))
    story.join(5, node=0)
    story.after(0.2)
    story.run()
    story.join(4, node=0)
    story.silent.add(4)
    story.after(0.2)
    assert story.order.restart == ""
    assert [member.agent for member in story.order.members] == [5]


def test_nodes_that_get_lost_again_and_again_end_the_job_but_another_try_may_find_better_ones() -> None:
    story = started(max_restarts=3, least=3)
    for number in range(4):
        story.membership.gone(2, "its agent was killed")
        story.after(0.1)
        story.say(0, 1)
        story.join(10 + number, node=2)
        story.after(70)
        story.run()
    assert story.order.end == EXIT_FAILED, "and not 64, which nobody tries again"
    assert "failed 4 times in a row" in story.order.reason


def test_storage_that_does_not_answer_is_waited_for_with_longer_and_longer_pauses() -> None:
    story = started(max_restarts=1, least=3, patience_seconds=600.0)
    began = story.now
    worlds: list[float] = []
    while story.order.end is None and story.now < 2000:
        worlds.append(story.now)
        story.fail(0, "failed", EXIT_UNAVAILABLE)
        story.say(1, 2, failures=(Failure(1, EXIT_FAILED, "failed"),))  # they lost their connection to it
        generation = story.order.generation
        while story.order.generation == generation and story.order.end is None:
            story.after(0.1)
        story.run()
    assert story.order.end == EXIT_FAILED
    assert 600 < story.now - began < 700
    assert "storage has not answered for" in story.order.reason
    pauses = [round(after - before) for before, after in pairwise(worlds)]
    assert pauses[:4] == [0, 4, 16, 60]
    assert set(pauses[4:]) == {60}
    assert {event["cause"] for event in story.of_kind("restart")} == {"storage_away"}


def test_an_outage_that_is_over_leaves_nothing_behind() -> None:
    story = started(max_restarts=1, least=3)
    for progress, code in ((0, EXIT_UNAVAILABLE), (0, EXIT_UNAVAILABLE), (1, 1), (1, 1)):
        story.progress = progress
        story.fail(0, "failed", code)
        story.say(1, 2)
        story.after(20)
        story.run()
    assert story.order.end == EXIT_DO_NOT_RETRY, "two failures since, one more than is allowed"


def fail_alone(story: Story, agent: int, times: int) -> None:
    """Its worker dies, and the others' lose their connection to it."""
    for _ in range(times):
        story.fail(agent, "failed", 1)
        story.after(0.1)
        others = [member.agent for member in story.order.members if member.agent != agent]
        for other in others:
            story.fail(other, "failed", 1)
        story.after(70)
        story.run()


def test_a_node_that_alone_breaks_one_world_after_another_is_left_out() -> None:
    story = started(excluded_seconds=300.0)
    fail_alone(story, 2, times=3)
    assert story.nodes == [0, 1]
    (excluded,) = story.of_kind("node_excluded")
    assert (excluded["node"], excluded["times"], excluded["why"]) == (2, 3, "rank 0 failed with exit code 1")
    assert story.after(200).restart == "", "it is no newcomer"
    assert story.after(100).restart == "after_saving", "it gets another chance"


def test_no_node_is_left_out_that_the_job_cannot_spare() -> None:
    story = started(least=3)
    fail_alone(story, 2, times=4)
    assert story.of_kind("node_excluded") == []
    assert story.order.end == EXIT_DO_NOT_RETRY


def test_no_node_is_left_out_for_what_happens_on_all_of_them() -> None:
    story = started(max_restarts=5)
    for _ in range(5):
        for agent in (0, 1, 2):
            story.fail(agent, "failed", 1)
        story.after(70)
        story.run()
    assert story.of_kind("node_excluded") == []


def test_a_node_that_was_left_out_is_better_than_none() -> None:
    story = started()
    fail_alone(story, 2, times=3)
    assert story.nodes == [0, 1]
    story.silent.add(1)
    story.membership.gone(1, "its agent was killed")
    story.after(0.1)
    story.say(0)
    story.after(70)
    assert story.nodes == [0, 2]


def test_a_node_that_was_done_and_told_to_leave_is_not_missed() -> None:
    story = started()
    story.say(0, phase="done")
    story.after(0.2)
    story.say(0, phase="leaving", exit_code=EXIT_STOPPED)
    assert story.after(0.5).restart == "", "the others work on"
    story.say(1, 2, phase="done")
    assert story.after(0.2).end == EXIT_DONE


def test_where_a_node_fails_after_one_that_was_done_left_the_others_go_on_without_it() -> None:
    story = started()
    story.say(0, phase="done")
    story.after(0.2)
    story.say(0, phase="leaving", exit_code=EXIT_STOPPED)
    story.after(0.2)
    story.fail(1)
    assert story.after(0.1).restart == "now"
    story.say(2)
    story.after(1.5)
    assert story.nodes == [1, 2]


def test_a_node_whose_world_is_history_does_not_end_the_job_for_good() -> None:
    story = started()
    story.silent.add(2)
    story.after(7)
    story.say(0, 1)
    story.after(1.5)
    story.run()
    assert story.nodes == [0, 1]
    story.silent.clear()
    story.say(2, phase="leaving", generation=1, exit_code=EXIT_DO_NOT_RETRY)
    assert story.after(1).end is None, "what it met is that the others went on"
    assert story.membership.is_history(2)
    assert not story.membership.is_history(0)
    story.say(0, phase="leaving", exit_code=EXIT_DO_NOT_RETRY)
    assert story.after(0.1).end == EXIT_DO_NOT_RETRY


def test_who_decides_may_leave_once_all_have_saved_and_forms_nothing_meanwhile() -> None:
    story = started(leavers_return=True)
    assert not story.membership.is_idle
    story.membership.pause()
    assert story.after(0.1).restart == "after_saving"
    story.fail(0, "saved", EXIT_STOPPED)
    story.fail(1, "saved", EXIT_STOPPED)
    story.after(5)
    assert not story.membership.is_idle, "node 2 saves still"
    story.fail(2, "saved", EXIT_STOPPED)
    story.after(5)
    assert story.membership.is_idle
    assert (story.order.generation, story.order.end) == (1, None), "the successor's worlds are for it to form"


def test_a_node_that_comes_back_on_another_machine_is_not_left_out() -> None:
    story = started()
    fail_alone(story, 2, times=3)
    assert story.nodes == [0, 1]
    story.silent.add(2)
    story.membership.join(10, 2, "127.0.0.1", story.now, "another machine")
    story.reports[10] = Report(port=1010)
    assert story.after(2).restart == "after_saving"


def test_a_connection_that_registered_and_never_spoke_replaces_its_node_for_no_longer_than_silence_lasts() -> None:
    story = Story(Rules(most=1, least=1, silence_seconds=4.0))
    story.join(0)
    story.join(1, node=0)
    story.silent.add(1)
    assert story.after(3).generation == 1, "it may be the newer one"
    story.after(3)
    assert story.order.members[0].agent == 0
