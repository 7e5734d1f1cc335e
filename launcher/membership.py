"""Pure: which nodes form the world. Decided in one place, outside the trainers, from what the nodes' agents report.

Agents report what they do; the one `Order` that all of them read says who is in the world, when workers shall stop for
the next one, and how the job ended. A world has as many nodes as are there and can share the global batch, and no more
than were asked for. Worlds are numbered.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

Phase = Literal["ready", "running", "done", "leaving"]
Restart = Literal["", "now", "after_saving"]
Cause = Literal["hung", "killed", "failed", "saved"]

EventListener = Callable[..., Any]
"""Called with the kind of an event and its facts."""

FINAL_CODES: Final = (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY)
"""Exit codes of a worker that end the job: no restart would mend it."""


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
    patience_seconds: float = 600.0  # for enough nodes to come
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
    joined_at: float
    beat: int = -1
    heard_at: float = 0.0
    is_lost: bool = False
    report: Report = field(default_factory=Report)


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
        self._rules, self._progress, self._on_event = rules, progress, on_event
        self._agents: dict[int, _Agent] = {}
        self._changed_at = 0.0  # when the nodes that are there changed, or what they do
        self._gathering_since: float | None = None
        self._lost: list[str] = []  # members of the world that are gone, and why
        self._has_left = False  # a member was told to leave, and saved
        self._is_booked = False  # why the world ended is counted
        self._failures: list[str] = []  # in a row without progress
        self._progress_before = 0.0
        self._not_before = 0.0
        self._is_waiting = False

    def join(self, agent: int, node: int, address: str, now: float) -> None:
        """A new agent. One that ran on the same node before is gone."""
        self.gone(node, "a new agent runs there")
        self._agents[agent] = _Agent(agent, node, address, joined_at=now, heard_at=now)
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
            if self._cancelled is not None and self.order.end is None:
                self._call("after_saving", now)
        if self.order.end is None and (self.order.restart or not self.order.members):
            self._gather(now)
        return self.order

    def _is_replaced(self, agent: _Agent) -> bool:
        return any(other.node == agent.node and other.number > agent.number for other in self._agents.values())

    def _is_member(self, agent: _Agent) -> bool:
        return any(agent.number == member.agent for member in self.order.members)

    def _is_ready(self, agent: _Agent) -> bool:
        """Whether nothing of it runs any more."""
        is_free = agent.report.generation == self.order.generation or not self._is_member(agent)
        return not agent.is_lost and agent.report.phase == "ready" and is_free

    def _let_leave(self, agent: _Agent) -> None:
        code = agent.report.exit_code
        if code in FINAL_CODES:
            self.end(code, f"node {agent.node} ended with exit code {code}")
        self._lose(
            agent, "it was told to stop, and saved" if code == EXIT_STOPPED else f"it ended with exit code {code}"
        )

    def _lose(self, agent: _Agent, why: str) -> None:
        if agent.is_lost:
            return
        agent.is_lost = True
        self._on_event("node_lost", node=agent.node, why=why)
        if not self._is_member(agent) or agent.report.phase == "done":
            return
        if agent.report.phase == "leaving" and agent.report.exit_code == EXIT_STOPPED:
            self._has_left = True
        else:
            self._lost.append(f"node {agent.node} was lost: {why}")

    def _judge_world(self, now: float) -> None:
        """Ends the job where the world is done; calls for the next world where this one broke or can grow."""
        world = [self._agents[member.agent] for member in self.order.members]
        if all(agent.report.phase == "done" for agent in world):
            self.end(EXIT_DONE)
            return
        ended = [agent for agent in world if self._is_ready(agent)]
        settled = [
            agent
            for agent in self._agents.values()
            if self._is_ready(agent) and now - agent.joined_at >= self._rules.settle_seconds
        ]
        if self._lost or any(failure.cause != "saved" for agent in ended for failure in agent.report.failures):
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
        """Counts why the world ended; too many failures in a row without progress end the job."""
        self._is_booked = True
        failures = [
            failure
            for agent in ready
            if self._is_member(agent)
            for failure in agent.report.failures
            if failure.cause != "saved"
        ]
        causes = self._lost or [_first_cause(failures)] if failures or self._lost else []
        if not causes:
            saved = any(self._is_member(agent) and agent.report.failures for agent in ready)
            grows = self._rules.fit(len(ready)) > len(self.order.members)
            if saved and not self._has_left and not grows:
                self.end(EXIT_STOPPED, "workers were told to stop, and saved")
                return
            self._on_event("restart", cause="node_left" if self._has_left else "node_joined", generation=self._worlds)
            return
        cause = "node_lost" if self._lost else f"worker_{_worst(failures).cause}"
        self._on_event("restart", cause=cause, why="; ".join(causes), generation=self._worlds)
        progress = self._progress()
        if progress > self._progress_before:
            self._progress_before = progress
            self._failures.clear()
        self._failures.append("; ".join(causes))
        count = len(self._failures)
        if count > self._rules.max_restarts:
            self._give_up(count)
        elif count > 1:
            self._not_before = now + 2.0 * 4 ** (count - 2)  # what is overloaded may need a rest

    def _give_up(self, count: int) -> None:
        if count == 1:
            self.end(EXIT_FAILED, self._failures[0])
            return
        is_same = len(set(self._failures)) == 1
        self.end(
            EXIT_DO_NOT_RETRY if is_same else EXIT_FAILED,
            f"the job failed {count} times in a row without a new checkpoint, "
            + (f"each time alike ({self._failures[0]})" if is_same else f"the last time as {self._failures[-1]}")
            + f". Restarting does not mend it: look into the log, or allow more with --max-restarts (now {count - 1})",
        )

    def _form(self, chosen: Sequence[_Agent]) -> None:
        members = tuple(Member(agent.number, agent.node, agent.address, agent.report.port) for agent in chosen)
        self.order = Order(self.order.generation + 1, members)
        self._gathering_since, self._lost, self._has_left = None, [], False
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
