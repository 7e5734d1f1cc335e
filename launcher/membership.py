"""Pure: which nodes form the world. Decided in one place, outside the trainers, from what the nodes' agents report.

Agents report what they do; the one `Order` that all of them read says who is in the world, when workers shall stop for
the next one, and how the job ended. A world has as many nodes as are there and can share the global batch, and no more
than were asked for. Worlds are numbered.

A broken world is followed by the next, sooner or later: failures in a row without a new checkpoint have longer and longer
pauses between them, and end the job when there are too many. 64, which nobody retries, is for workers that fail alike each
time. Nodes that get lost end it as failed, for another try may find better ones. Storage that does not answer is waited
for as long as nodes are. A node that alone breaks one world after another is left out of the next ones, where they can do
without it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from datastore.errors import (
    EXIT_ASKED_WRONGLY,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_UNAVAILABLE,
)

Phase = Literal["ready", "running", "done", "leaving"]
Restart = Literal["", "now", "after_saving"]
Cause = Literal["hung", "killed", "failed", "saved"]

EventListener = Callable[..., Any]
"""Called with the kind of an event and its facts."""

FINAL_CODES: Final = (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY)
"""Exit codes of a worker that end the job: no restart would mend it."""

_BLAMED_TIMES: Final = 3  # in a row and alone, after which a node is left out
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 4.0, 60.0


@dataclass(frozen=True)
class Failure:
    """A worker that ended before its work was done."""

    rank: int
    exit_code: int
    cause: Cause


@dataclass(frozen=True)
class Report:
    """What an agent says of its node."""

    phase: Phase = "ready"
    generation: int = 0  # of the world that it was in last
    port: int = 0  # free on its node, for the workers' own store
    failures: tuple[Failure, ...] = ()  # why the workers of that world ended
    exit_code: int = EXIT_DONE  # with which a leaving one ends

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        facts = json.loads(text)
        return cls(**facts | {"failures": tuple(Failure(**failure) for failure in facts["failures"])})


@dataclass(frozen=True)
class Member:
    """One agent in a world. Its place in the world's list is its node's rank."""

    agent: int
    node: int
    address: str
    port: int


@dataclass(frozen=True)
class Order:
    """What all agents read."""

    generation: int = 0
    members: tuple[Member, ...] = ()
    restart: Restart = ""  # workers of this generation shall end: at once, or as soon as they have saved
    end: int | None = None  # the job's exit code
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Order":
        facts = json.loads(text)
        return cls(**facts | {"members": tuple(Member(**member) for member in facts["members"])})


@dataclass(frozen=True)
class Rules:
    """What a job's worlds may be, and how patient it is."""

    most: int  # nodes
    least: int
    counts: tuple[int, ...] = ()  # numbers of nodes that divide the work; empty: all
    max_restarts: int = 3  # in a row, without progress
    silence_seconds: float = 6.0  # after which a node is lost
    first_call_seconds: float = 60.0  # for all nodes to come to the first world
    last_call_seconds: float = 1.0  # for one more, once enough are there
    settle_seconds: float = 1.0  # that a new node must have been there before a running world stops for it
    patience_seconds: float = 600.0  # for enough nodes to come, and for storage to answer
    excluded_seconds: float = 1800.0  # for which a node that alone breaks every world is left out
    leavers_return: bool = False  # a node that is told to leave is started again elsewhere: too few wait for it

    def fit(self, present: int) -> int:
        """The largest world of at most so many nodes; 0 where there is none."""
        allowed = self.counts or range(1, self.most + 1)
        return max((count for count in allowed if self.least <= count <= min(present, self.most)), default=0)


@dataclass
class _Agent:
    """An agent as it is known here."""

    number: int
    node: int
    address: str
    machine: str
    joined_at: float
    beat: int = -1
    heard_at: float = 0.0
    is_lost: bool = False
    is_done: bool = False  # its workers of the newest world are, and nothing has called them back
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class _Setback:
    """Why a world ended without a new checkpoint."""

    why: str
    node: int | None  # the one node whose fault it was, if that is clear
    is_of_worker: bool  # and not of a node that was lost
    is_outage: bool = False  # storage did not answer


class Membership:
    """Decides; whoever holds it carries reports in and the order out."""

    def __init__(
        self,
        rules: Rules,
        *,
        progress: Callable[[], float] = lambda: 0.0,
        on_event: EventListener = lambda kind, **facts: None,
        generation: int = 0,  # after which worlds are numbered
    ) -> None:
        self.order = Order(generation)
        self._before = generation
        self._cancelled: int | None = None  # the exit code of a job that shall save and end
        self.is_stopping = False  # the whole job was told to stop: nothing is formed any more
        self._is_paused = False
        self._rules, self._progress, self._on_event = rules, progress, on_event
        self._agents: dict[int, _Agent] = {}
        self._changed_at = 0.0  # when the nodes that are there changed, or what they do
        self._gathering_since: float | None = None
        self._lost: dict[int, str] = {}  # nodes of the world that are gone, and why
        self._failed_first: set[int] = set()  # nodes whose workers had failed when the others' were still at work
        self._has_left = False  # a member was told to leave, and saved
        self._is_booked = False  # why the world ended is counted
        self._setbacks: list[_Setback] = []  # in a row without progress
        self._outage_since: float | None = None
        self._excluded: dict[tuple[int, str], float] = {}  # by node and machine: until when
        self._progress_before = 0.0
        self._not_before = 0.0
        self._is_waiting = False

    def join(self, agent: int, node: int, address: str, now: float, machine: str = "") -> None:
        """A new agent. One that ran on the same node before is gone."""
        made = _Agent(agent, node, address, machine, joined_at=now, heard_at=now)
        if self._is_replaced(made):  # a connection that its agent gave up long ago had its last words on their way
            made.is_lost = True
            self._agents[agent] = made
            return
        self.gone(node, "a new agent runs there")
        self._agents[agent] = made
        self._changed_at = now
        self._on_event("node_joined", node=node)

    def hear(self, agent: int, beat: int, report: Report, now: float) -> None:
        """The newest word of an agent; its beat grows as long as it lives."""
        known = self._agents[agent]
        if beat != known.beat:
            known.beat, known.heard_at = beat, now
            if known.is_lost and report.phase != "leaving" and not self._is_replaced(known):
                known.is_lost, known.joined_at, self._changed_at = False, now, now
                self._on_event("node_joined", node=known.node)
        if report != known.report:
            known.report, self._changed_at = report, now
            if report.phase != "leaving":  # who leaves with its work done leaves nothing undone
                known.is_done = report.phase == "done" and report.generation == self.order.generation

    def gone(self, node: int, why: str) -> None:
        """The agents of a node have ended: somebody saw it."""
        for agent in self._agents.values():
            if agent.node == node:
                self._lose(agent, why)

    def end(self, code: int, reason: str = "") -> None:
        """Ends the job on all nodes."""
        if self.order.end is None:
            self.order = replace(self.order, end=code, reason=reason)

    def cancel(self, code: int) -> None:
        """All nodes save; then the job ends with this code."""
        self._cancelled = code

    def pause(self) -> None:
        """All nodes save and wait: whoever decides here is about to leave, and its successor forms the next world."""
        self._is_paused = True

    @property
    def is_idle(self) -> bool:
        """Whether no node of the world is at work any more."""
        return not any(
            self._is_member(agent) and not agent.is_lost and not self._is_ready(agent)
            for agent in self._agents.values()
        )

    def is_history(self, node: int) -> bool:
        """Whether the node's agent worked in an older world than the one that counts: its end says nothing of the job."""
        agents = [agent for agent in self._agents.values() if agent.node == node]
        newest = max(agents, key=lambda agent: agent.number, default=None)
        return newest is not None and newest.report.generation > 0 and not self._is_member(newest)

    def heard_within(self, seconds: float, now: float) -> bool:
        """Whether any agent was heard of within a time: whoever is told of the job's end leaves."""
        return any(now - agent.heard_at <= seconds for agent in self._agents.values())

    @property
    def _worlds(self) -> int:
        """How many were formed."""
        return self.order.generation - self._before

    def tick(self, now: float) -> Order:
        """The order that follows from everything heard."""
        if self.is_stopping:
            return self.order
        for agent in self._agents.values():
            if agent.report.phase == "leaving":
                self._let_leave(agent)
            elif now - agent.heard_at > self._rules.silence_seconds:
                self._lose(agent, f"silent for {self._rules.silence_seconds:g} s")
        if self.order.end is None and self.order.members:
            self._judge_world(now)
            if (self._cancelled is not None or self._is_paused) and self.order.end is None:
                self._call("after_saving", now)
        if self.order.end is None and not self._is_paused and (self.order.restart or not self.order.members):
            self._gather(now)
        return self.order

    def _is_replaced(self, agent: _Agent) -> bool:
        return any(
            other.node == agent.node and other.number > agent.number and not other.is_lost
            for other in self._agents.values()
        )

    def _is_member(self, agent: _Agent) -> bool:
        return any(agent.number == member.agent for member in self.order.members)

    def _is_ready(self, agent: _Agent) -> bool:
        """Whether nothing of it runs any more."""
        is_free = agent.report.generation == self.order.generation or not self._is_member(agent)
        return not agent.is_lost and agent.report.phase == "ready" and is_free

    def _let_leave(self, agent: _Agent) -> None:
        code = agent.report.exit_code
        if code in FINAL_CODES and not agent.is_lost and self._is_member(agent):
            # one that was cut off, and whose world is history, has no say: what it met is that the others went on
            self.end(code, f"node {agent.node} ended with exit code {code}")
        self._lose(
            agent, "it was told to stop, and saved" if code == EXIT_STOPPED else f"it ended with exit code {code}"
        )

    def _lose(self, agent: _Agent, why: str) -> None:
        if agent.is_lost:
            return
        agent.is_lost = True
        self._on_event("node_lost", node=agent.node, why=why)
        if not self._is_member(agent) or agent.is_done:
            return
        if agent.report.phase == "leaving" and agent.report.exit_code == EXIT_STOPPED:
            self._has_left = True
        else:
            self._lost[agent.node] = f"node {agent.node} was lost: {why}"

    def _judge_world(self, now: float) -> None:
        """Ends the job where the world is done; calls for the next world where this one broke or can grow."""
        world = [self._agents[member.agent] for member in self.order.members]
        if all(agent.is_done for agent in world):
            self.end(EXIT_DONE)
            return
        ended = [agent for agent in world if self._is_ready(agent)]
        settled = [
            agent
            for agent in self._agents.values()
            if self._is_ready(agent)
            and now - agent.joined_at >= self._rules.settle_seconds
            and (self._is_member(agent) or not self._is_excluded(agent, now))
        ]
        failed = {agent.node for agent in ended for failure in agent.report.failures if failure.cause != "saved"}
        if self._lost or failed:
            if self.order.restart != "now":
                self._failed_first = failed
            self._call("now", now)
        elif self.order.restart:
            return
        elif self._has_left or ended or self._rules.fit(len(world) + len(settled)) > len(world):
            self._call("after_saving", now)

    def _call(self, restart: Restart, now: float) -> None:
        if self.order.restart not in ("now", restart):
            self.order = replace(self.order, restart=restart)
            self._gathering_since = self._changed_at = now

    def _gather(self, now: float) -> None:
        """Forms the next world once all workers have ended and enough nodes are there."""
        if self._gathering_since is None:
            self._gathering_since = now
        present = [agent for agent in self._agents.values() if not agent.is_lost]
        if any(self._is_member(agent) and not self._is_ready(agent) for agent in present):
            return
        if self._cancelled is not None:
            self.end(self._cancelled, "it was cancelled, and all saved")
            return
        ready = [agent for agent in present if self._is_ready(agent)]
        if self.order.restart and not self._is_booked:
            self._book(ready, now)
        wanted = [agent for agent in ready if not self._is_excluded(agent, now)]
        if self._rules.fit(len(wanted)):  # else a bad node is better than none
            ready = wanted
        size = self._rules.fit(len(ready))
        if self.order.end is not None or now < self._not_before:
            return
        if size == 0:
            self._wait(len(ready), now)
            return
        patience = self._rules.last_call_seconds if self._worlds else self._rules.first_call_seconds
        if size == self._rules.fit(self._rules.most) or now - self._changed_at >= patience:
            self._form(sorted(ready, key=lambda agent: agent.node)[:size])

    def _wait(self, ready: int, now: float) -> None:
        assert self._gathering_since is not None
        if self._has_left and not self._rules.leavers_return:
            self.end(EXIT_STOPPED, "a node was told to stop, all saved, and the others are too few to go on")
        elif now - self._gathering_since > self._rules.patience_seconds:
            wanted = f"{self._rules.least} nodes" if self._rules.least > 1 else "a node"
            self.end(EXIT_FAILED, f"{wanted} did not come within {self._rules.patience_seconds:.0f} s, {ready} did")
        elif self._worlds and not self._is_waiting:
            self._is_waiting = True
            self._on_event("waiting_for_nodes", there=ready, least=self._rules.least)

    def _book(self, ready: Sequence[_Agent], now: float) -> None:
        """Takes down why the world ended; too many failures in a row without progress end the job."""
        self._is_booked = True
        of_nodes = [
            (agent.node, failure)
            for agent in ready
            if self._is_member(agent)
            for failure in agent.report.failures
            if failure.cause != "saved"
        ]
        if not (of_nodes or self._lost):
            saved = any(self._is_member(agent) and agent.report.failures for agent in ready)
            grows = self._rules.fit(len(ready)) > len(self.order.members)
            if saved and not self._has_left and not grows:
                self.end(EXIT_STOPPED, "workers were told to stop, and saved")
                return
            self._on_event("restart", cause="node_left" if self._has_left else "node_joined", generation=self._worlds)
            return
        setback = self._explain(of_nodes)
        cause = "node_lost" if self._lost else f"worker_{_worst([failure for _, failure in of_nodes]).cause}"
        cause = "storage_away" if setback.is_outage else cause
        self._on_event("restart", cause=cause, why=setback.why, generation=self._worlds)
        progress = self._progress()
        if progress > self._progress_before:
            self._progress_before, self._outage_since = progress, None
            self._setbacks.clear()
        self._setbacks.append(setback)
        if setback.is_outage:
            self._outage_since = now if self._outage_since is None else self._outage_since
            if now - self._outage_since > self._rules.patience_seconds:
                self.end(EXIT_FAILED, f"storage has not answered for {now - self._outage_since:.0f} s: {setback.why}")
        else:
            self._exclude_or_give_up([each for each in self._setbacks if not each.is_outage], now)
        if len(self._setbacks) > 1:  # what is overloaded may need a rest
            pause = _FIRST_PAUSE_SECONDS * 4 ** min(len(self._setbacks) - 2, 9)
            self._not_before = now + min(pause, _LONGEST_PAUSE_SECONDS)

    def _explain(self, of_nodes: Sequence[tuple[int, Failure]]) -> _Setback:
        """Why the world ended, and through which node if through one."""
        if self._lost:
            only = next(iter(self._lost)) if len(self._lost) == 1 else None
            return _Setback("; ".join(self._lost.values()), only, is_of_worker=False)
        failures = [failure for _, failure in of_nodes]
        worst = _worst(failures)
        nodes = {node for node, failure in of_nodes if failure.cause == worst.cause}
        if len(nodes) > 1 and len(self._failed_first) == 1:  # the others only lost their connection to it
            nodes = set(self._failed_first)
        only = next(iter(nodes)) if len(nodes) == 1 else None
        is_outage = worst.cause == "failed" and any(each.exit_code == EXIT_UNAVAILABLE for each in failures)
        return _Setback(_first_cause(failures), only, is_of_worker=True, is_outage=is_outage)

    def _exclude_or_give_up(self, setbacks: Sequence[_Setback], now: float) -> None:
        count, limit = len(setbacks), self._rules.max_restarts
        node = setbacks[-1].node
        others = {
            agent.node for agent in self._agents.values() if not agent.is_lost and not self._is_excluded(agent, now)
        } - {node}
        is_of_one_node = node is not None and all(each.node == node for each in setbacks)
        if count > 1 and count >= min(_BLAMED_TIMES, limit + 1) and is_of_one_node and self._rules.fit(len(others)):
            assert node is not None
            machine = max((agent.number, agent.machine) for agent in self._agents.values() if agent.node == node)[1]
            self._excluded[node, machine] = now + self._rules.excluded_seconds
            self._on_event(
                "node_excluded", node=node, times=count, why=setbacks[-1].why, seconds=self._rules.excluded_seconds
            )
            self._setbacks.clear()
        elif count > limit:
            self._give_up(setbacks)

    def _is_excluded(self, agent: _Agent, now: float) -> bool:
        return now < self._excluded.get((agent.node, agent.machine), 0.0)

    def _give_up(self, setbacks: Sequence[_Setback]) -> None:
        count, last = len(setbacks), setbacks[-1]
        if count == 1:
            self.end(EXIT_FAILED, last.why)
            return
        is_same = last.is_of_worker and all(each.why == last.why for each in setbacks)
        how = f"each time alike ({last.why})" if is_same else f"the last time as {last.why}"
        mend = "Restarting does not mend it: look into the log" if is_same else "Look into the log and at the nodes"
        self.end(
            EXIT_DO_NOT_RETRY if is_same else EXIT_FAILED,
            f"the job failed {count} times in a row without a new checkpoint, {how}. {mend}, or allow more with "
            f"--max-restarts (now {count - 1})",
        )

    def _form(self, chosen: Sequence[_Agent]) -> None:
        members = tuple(Member(agent.number, agent.node, agent.address, agent.report.port) for agent in chosen)
        self.order = Order(self.order.generation + 1, members)
        self._gathering_since, self._lost, self._has_left = None, {}, False
        self._failed_first = set()
        self._is_booked = self._is_waiting = False
        self._on_event("world_formed", generation=self._worlds, nodes=[member.node for member in members])


def _worst(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others: workers that lose their connection to a killed or hung one fail, too."""
    order: Mapping[Cause, int] = {"hung": 0, "killed": 1, "failed": 2, "saved": 3}
    return min(failures, key=lambda failure: (order[failure.cause], failure.rank))


def _first_cause(failures: Sequence[Failure]) -> str:
    worst = _worst(failures)
    how = {"hung": "hung", "killed": f"was killed by signal {-worst.exit_code}"}
    return f"rank {worst.rank} {how.get(worst.cause, f'failed with exit code {worst.exit_code}')}"
