"""Stage: trains a recipe, a student or a teacher. The loop and the step: the file to read first.

Every process of a run executes `pretrain`. Once a step they agree, in one sum over the ranks, on whether to stop,
whether to save, whether the loss is finite and whether the next step can be read, so that all do the same at the same
step.
"""

import argparse
import hashlib
import logging
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from datastore.errors import EXIT_DONE, AskedWrongly, DoNotRetry, Stopped, Unavailable, ViewpointError
from datastore.progress import Progress
from datastore.stopping import stop_asked
from trainer.heartbeat import HEART
from trainer.schedule import lr_at

if TYPE_CHECKING:
    import threading

    from torch import Tensor, nn

    from datastore.batch import Batch
    from datastore.layout import Store
    from datastore.stream import Stream
    from trainer.checkpoint import Position
    from trainer.config import RunConfig
    from trainer.distributed import World
    from trainer.engine import Engine
    from trainer.metrics import TimeAccount
    from trainer.objectives.base import Objective, Terms
    from trainer.patience import Patience
    from trainer.runfolder import Record, RunFolder
    from trainer.saving import Saved, Saver

HELP = "train a recipe: one process of a run"

_CONFIG_SECONDS: Final = 60.0  # that the config may take to come, before it can say how patient the run is

_logger = logging.getLogger("trainer.pretrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the resolved recipe, as a run folder holds it")
    parser.add_argument("--run", required=True, metavar="URL", help="the run folder, local or object storage")
    parser.add_argument("--resume", action="store_true", help="fail where there is no checkpoint to go on from")


def run(arguments: argparse.Namespace) -> int:
    """Trains from the newest checkpoint to the end; raises Stopped where it was asked to stop and all work is saved."""
    HEART.start()
    with stop_asked() as stop:  # before the imports, which take seconds: a signal meanwhile is not lost
        from trainer.distributed import World, joined
        from trainer.patience import Patience
        from trainer.runfolder import RunFolder

        config = Patience(_CONFIG_SECONDS).persist(lambda: config_at(arguments.config), f"read {arguments.config}")
        folder = RunFolder(arguments.run, writer=f"rank-{World.from_env().rank}")
        with joined(config.engine.collective_timeout_seconds) as world:
            pretrain(config, folder, world, stop, must_exist=arguments.resume)
    return EXIT_DONE


def pretrain(
    config: "RunConfig",
    folder: "RunFolder",
    world: "World",
    stop: "threading.Event",
    *,
    must_exist: bool = False,
) -> None:
    """Trains the run in this folder to its end."""
    import psutil
    import torch

    from datastore.layout import open_store
    from datastore.stream import open_stream
    from trainer.checkpoint import Identity, refuse_another_training, restore, start
    from trainer.commits import committed_steps, due
    from trainer.distributed import gather_reports
    from trainer.engine import build_engine, split_batch
    from trainer.export import network_description
    from trainer.fragments import check_layout
    from trainer.metrics import Means, TimeAccount
    from trainer.numerics import be_deterministic, exact_float32
    from trainer.patience import Patience, PatientFolder
    from trainer.saving import Saver

    account, began_at = TimeAccount(), psutil.Process().create_time()
    account.add_earlier({"startup": time.time() - began_at})  # the imports
    be_deterministic()
    exact_float32()
    split = split_batch(config.global_batch, world.size, config.engine.max_micro_batch)
    # less than ranks wait for each other: one of them may have trouble that the others have not
    patience = Patience(min(config.checkpoint.retry_seconds, 0.8 * config.engine.collective_timeout_seconds))
    store = patience.persist(lambda: open_store(store_url(config)), f"open {store_url(config)}")
    objective = build_objective(config, store)
    checkpoints = PatientFolder(folder.checkpoints_url, patience)
    if (
        config.start_from is not None
        and gather_reports(committed_steps(checkpoints) if world.is_first else [])[0] == []
    ):
        load_first_weights(objective.encoder, config.start_from)
    if objective.compares_samples and split.accumulation > 1 and world.is_first:
        _logger.warning(
            "Objective %r compares the samples of %d at a time and not of the global batch of %d, which is accumulated: "
            "raise engine.max_micro_batch or start more processes where that is not meant.",
            config.objective.kind, split.micro_batch * world.size, config.global_batch,
        )  # fmt: skip
    with ExitStack() as closing:
        engine = closing.enter_context(build_engine(objective, config.engine, world, split))
        check_layout(engine)
        identity = Identity(config.hash(), config.to_yaml())
        refuse_another_training(engine, checkpoints, identity)
        generation = start(engine, checkpoints)
        saver = closing.enter_context(Saver(engine, checkpoints, generation, config.checkpoint, identity))
        position, damaged = restore(engine, checkpoints, identity, generation, must_exist=must_exist)
        history = f"read the history of {folder.url}"
        events = gather_reports(patience.persist(folder.events, history) if world.is_first else [])[0]
        account.add_earlier(earlier_seconds(folder, world, events, position, began_at, patience))
        if position.store_manifest is None:  # ranks may have opened different ones, while the store grew
            position = replace(position, store_manifest=gather_reports(store.manifest.number)[0])
        open_it = partial(
            open_stream,
            config.data,
            objective.batch_type,
            teacher=config.teacher,
            global_batch=config.global_batch,
            micro_batch=split.micro_batch,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            start=position.samples_seen,
            manifest=position.store_manifest,
            pin_memory=engine.device.type == "cuda",
        )
        stream = closing.enter_context(patience.persist(open_it, f"read {store.url}"))
        if position.rows_digest not in (None, stream.rows_digest):
            raise DoNotRetry(
                f"This run would go on with other samples than those it began with, or in another order: {store.url}, the "
                f"list that data.shapes_url names or data.unit_samples is not what it was. Put it back, or begin a run of "
                f"another name (--run)."
            )
        position = replace(position, rows_digest=stream.rows_digest)
        total_steps = config.total_steps(stream.steps_per_epoch)
        report = closing.enter_context(Report(config, folder, world, account, stream, position, total_steps))
        network = network_description(objective.encoder, config)
        begin = partial(report.started, damaged, network, generation, events, saver)
        patience.persist(begin, f"write to {folder.url}")

        saved_at, figures = time.monotonic(), Means()
        account.enter("data_wait")
        steps = stream.steps(total_steps - position.step)
        with HEART.waiting_for_data(config.data_wait_seconds):
            coming = next_batches(steps)
            is_unreadable = world.any(isinstance(coming, Exception))
        if is_unreadable:
            raise_unreadable(coming, world)
        while coming is not None:
            assert isinstance(coming, list), "ranks that cannot read raise together"
            micro_batches = coming
            lr = lr_at(
                config.engine.schedule, config.engine.optimizer.lr, position.step, stream.steps_per_epoch, total_steps
            )
            engine.set_lr(lr)
            torch.manual_seed(step_seed(config.seed, position.step, world.rank))
            terms = train_step(engine, micro_batches, account)
            position = position.advanced(config.global_batch)
            saver.prepare()

            # until the ranks agree: each of them waits there for the data of the slowest
            with HEART.waiting_for_data(config.data_wait_seconds):
                account.enter("data_wait")
                coming = next_batches(steps)  # before the ranks agree: they save first where it cannot be read
                account.enter("other")
                report.saved(saver.poll())
                is_due = world.is_first and due(
                    config.checkpoint,
                    position.step,
                    time.monotonic() - saved_at,
                    stall_seconds=saver.stall_seconds,
                    in_flight=saver.in_flight is not None,
                )
                agreed = agree(
                    terms,
                    stop=stop.is_set(),
                    save=is_due,
                    unreadable=isinstance(coming, Exception),
                    save_failed=saver.has_failed,
                )
            if agreed.save_failed:
                saver.raise_failure()
            if not agreed.is_finite or not engine.has_finite_gradient:
                problem = explain_not_finite(terms, micro_batches, engine, position)
                report.saved(saver.finish())
                report.not_finite(position, problem)
                raise DoNotRetry(problem)
            figures.add({"loss": sum(agreed.terms.values()), **agreed.terms})
            report.step(position, agreed.terms, objective.figures, lr, engine.grad_norm)
            HEART.beat(position.step)

            ends_here = agreed.stop or agreed.unreadable or coming is None
            if agreed.save or ends_here:
                account.enter("checkpoint")
                HEART.enter("checkpoint")
                position, saved_at = position.with_totals(account.seconds), time.monotonic()
                report.saved(saver.begin(position, figures.take()))
                if ends_here:
                    report.saved(saver.finish())
                account.enter("other")
                HEART.beat(position.step)
            if agreed.unreadable:
                report.unreadable(position)
                raise_unreadable(coming, world)
            if agreed.stop and coming is not None:
                report.stopped(position)
                raise Stopped(
                    f"Stopped at step {position.step:,} of {total_steps:,}; everything is saved in {folder.url}. "
                    f"The same command goes on from here."
                )
        HEART.enter("finishing")
        report.finished(position)


def earlier_seconds(
    folder: "RunFolder",
    world: "World",
    events: "Sequence[Record]",
    position: "Position",
    began_at: float,
    patience: "Patience",
) -> dict[str, float]:
    """Where the time of earlier starts went, as rank 0 knows it; the same on every rank."""
    from trainer.distributed import gather_reports
    from trainer.history import account_so_far, last_metrics, was_stopped

    mine: dict[str, float] = {}
    if world.is_first:
        last = patience.persist(lambda: last_metrics(folder.url), f"read the last figures of {folder.url}")
        records = [*events, *last]
        mine = account_so_far(records, position.totals, began_at, was_stopped=was_stopped(events))
    return gather_reports(mine)[0]


def next_batches(steps: "Iterator[list[Batch]]") -> "list[Batch] | Exception | None":
    """What is read for the next step. An error is returned: what is trained so far is saved before it is raised."""
    try:
        return next(steps, None)
    except (ViewpointError, OSError) as error:
        return error


def train_step(engine: "Engine", micro_batches: Sequence["Batch"], account: "TimeAccount") -> "list[Terms]":
    """One optimizer update. Returns the terms of each micro-batch, as this rank sees them."""
    seen: list[Terms] = []
    for batch in micro_batches:
        account.enter("forward")
        terms = engine(batch.to(engine.device))  # Objective.forward
        account.enter("backward")
        engine.backward(terms)  # divides by the number of micro-batches
        account.enter("optimizer")
        engine.step()  # updates on the last one only
        seen.append({name: term.detach() for name, term in terms.items()})
    account.enter("other")
    return seen


class Agreed(NamedTuple):
    """What all ranks know after a step."""

    stop: bool
    save: bool
    unreadable: bool  # what the next step needs
    save_failed: bool
    is_finite: bool
    terms: dict[str, float]  # mean over ranks and micro-batches


def agree(
    seen: "list[Terms]", *, stop: bool, save: bool, unreadable: bool = False, save_failed: bool = False
) -> Agreed:
    """Which flags any rank has set, whether all losses are finite, and each term's mean: in one sum."""
    import torch

    from trainer.distributed import all_reduce_sum, communication_device, world_size

    names = list(seen[0])
    values = torch.stack([terms[name].double() for terms in seen for name in names]).view(len(seen), len(names))
    flags = torch.tensor([stop, save, unreadable, save_failed], dtype=torch.float64, device=values.device)
    is_wrong = (~values.isfinite()).any().double().view(1)
    total = all_reduce_sum(torch.cat([flags, is_wrong, values.mean(dim=0)]).to(communication_device())).tolist()
    any_stop, any_save, any_unreadable, any_failed, any_wrong = (count > 0 for count in total[:5])
    means = [value / world_size() for value in total[5:]]
    terms = dict(zip(names, means, strict=True))
    return Agreed(any_stop, any_save, any_unreadable, any_failed, not any_wrong, terms)


def raise_unreadable(coming: "list[Batch] | Exception | None", world: "World") -> None:
    """Raises on all ranks what some rank's data could not be read for; all ranks call it."""
    from trainer.distributed import gather_reports

    mine = coming if isinstance(coming, Exception) else None
    problems = gather_reports(None if mine is None else (str(mine), isinstance(mine, DoNotRetry)))
    if isinstance(mine, DoNotRetry):
        raise mine
    rank, (message, is_hopeless) = next((rank, each) for rank, each in enumerate(problems) if each is not None)
    raise (DoNotRetry if is_hopeless else Unavailable)(f"Rank {rank}: {message}") from mine


def explain_not_finite(
    seen: "list[Terms]", micro_batches: Sequence["Batch"], engine: "Engine", position: "Position"
) -> str:
    """Which term was not finite, on which rank and for which samples; the same message on all ranks."""
    from trainer.distributed import gather_reports

    mine = [
        f"term {name!r} is {float(term)} on rank {engine.world.rank} for samples {batch.ids.tolist()}"
        for terms, batch in zip(seen, micro_batches, strict=True)
        for name, term in terms.items()
        if not term.isfinite()
    ]
    found = [line for lines in gather_reports(mine) for line in lines]
    what = "; ".join(found) or f"the norm of the gradient is {engine.grad_norm}, with finite terms"
    return (
        f"Training stopped at step {position.step}, before it was saved: {what}. Look at those samples with "
        f"`viewpoint inspect`, or start a new run with a lower engine.optimizer.lr or with engine.clip_grad_norm; this "
        f"one stays at the checkpoint before."
    )


class Report:
    """What rank 0 tells people and files, and every rank Prometheus."""

    def __init__(
        self,
        config: "RunConfig",
        folder: "RunFolder",
        world: "World",
        account: "TimeAccount",
        stream: "Stream[Batch]",
        position: "Position",
        total_steps: int,
    ) -> None:
        from trainer.metrics import Exporter, Reads

        self._config, self._folder, self._world = config, folder, world
        self._account, self._stream, self._total_steps = account, stream, total_steps
        self._exporter = Exporter(config.metrics, world, folder.name, account)
        self._exporter.reads = lambda: Reads(
            stream.bytes_read, stream.batches_ready, stream.retries, stream.cache_hits, stream.memory_bytes
        )
        self._resumed_from = position
        self._progress = None
        if world.is_first:
            self._progress = Progress(config.job, total_steps, "steps", resumed=position.step)
        self._line_at, self._line_samples = time.monotonic(), position.samples_seen
        self._line_wait = stream.data_wait_seconds
        self._rates, self._wait_shares = array("d"), array("d")  # of every line: what stays on the screen at the end
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._closing.callback(self._exporter.close)
        if self._world.is_first:
            self._closing.enter_context(self._folder.written_behind(self._config.checkpoint.retry_seconds))
        if self._progress is not None:
            self._closing.push(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def started(
        self,
        damaged: Sequence[str],
        network: Mapping[str, Any],
        generation: int,
        events: "Sequence[Record]",
        saver: "Saver",
    ) -> None:
        """Notes the start, and loudly each checkpoint that had to be passed over."""
        from trainer.history import restarts_by_cause

        self._exporter.generation = generation
        self._exporter.uploaded_bytes = lambda: saver.bytes_written
        self._exporter.committed_step = self._resumed_from.step
        if not self._world.is_first:
            return
        if not self._folder.exists():
            self._folder.write_config(self._config)
        self._folder.write_network(network)
        for problem in damaged:
            self._folder.append_event("checkpoint_damaged", problem=problem, resumed_from=self._resumed_from.step)
        self._folder.append_event(
            "started",
            world=self._world.size,
            generation=generation,
            resumed_from=self._resumed_from.step,
            total_steps=self._total_steps,
            zero_stage=self._config.engine.zero_stage,
            account=self._account.seconds,
        )
        self._exporter.restarts = restarts_by_cause([*events, {"event": "started"}])

    def step(
        self,
        position: "Position",
        terms: dict[str, float],
        figures_of_objective: "Mapping[str, Tensor]",
        lr: float,
        grad_norm: float,
    ) -> None:
        """Shows a finished step, and writes its line where one is due."""
        if position.step % self._config.metrics.every_steps and position.step != self._total_steps:
            return
        from trainer.metrics import StepFigures

        now, wait = time.monotonic(), self._stream.data_wait_seconds
        seconds = max(now - self._line_at, 1e-9)
        figures = StepFigures(
            step=position.step,
            epoch=position.step / self._stream.steps_per_epoch,
            loss=sum(terms.values()),
            terms=terms,
            figures={name: float(value) for name, value in figures_of_objective.items()},
            lr=lr,
            grad_norm=grad_norm,
            samples_per_second=(position.samples_seen - self._line_samples) / seconds,
            data_wait_share=(wait - self._line_wait) / seconds,
            phases=self._account.phases(),
        )
        self._line_at, self._line_samples, self._line_wait = now, position.samples_seen, wait
        self._exporter.observe(figures, position.samples_seen)
        if self._progress is not None:
            self._folder.append_metrics(figures.record() | self._account_of_line())
            rate, share = figures.samples_per_second, figures.data_wait_share
            self._rates.append(rate)
            self._wait_shares.append(share)
            if position.step == self._total_steps:  # what stays on the screen is of the whole stage
                rate, share = median(self._rates), median(self._wait_shares)
            note = {"samples/s": f"{rate:.0f}", "data wait": f"{100 * share:.0f}%"}
            self._progress.update(position.step, loss=figures.loss, **note)

    def saved(self, saved: "Sequence[Saved]") -> None:
        """Notes checkpoints that were committed."""
        for each in saved:
            self._exporter.saved(each.step, each.stall_seconds, each.seconds)
            self._folder.append_event(
                "saved", step=each.step, seconds=each.seconds, stall_seconds=each.stall_seconds, bytes=each.num_bytes
            )

    def _account_of_line(self) -> dict[str, Any]:
        """From which the next start, after whatever ends this one, knows where the time went."""
        from trainer.history import ACCOUNT

        return {ACCOUNT: {bucket: round(spent, 3) for bucket, spent in self._account.seconds.items() if spent > 0}}

    def unreadable(self, position: "Position") -> None:
        """Notes that the run stopped because its data could not be read."""
        self._end("unreadable", step=position.step)

    def not_finite(self, position: "Position", problem: str) -> None:
        """Notes why the run ended here."""
        self._end("not_finite", step=position.step, problem=problem)

    def stopped(self, position: "Position") -> None:
        """Notes that the run stopped before its end."""
        self._end("stopped", step=position.step, **self._account_of_line())

    def finished(self, position: "Position") -> None:
        """Exports what was trained and notes the end; a run that had finished before is left as it is."""
        from trainer.export import export_run

        if self._world.is_first and not self._folder.is_finished():
            export_run(self._folder, position.step, self._folder.export_url)
            self._end("finished", step=position.step, seconds=self._account.seconds, **self._account_of_line())

    def _end(self, kind: str, **facts: Any) -> None:
        """Writes down how the run ended, and waits until that is on storage."""
        if self._world.is_first:
            HEART.enter("finishing")
            self._folder.append_event(kind, **facts)
            self._folder.flush()


def config_at(url: str) -> "RunConfig":
    """The config in a file, local or on object storage."""
    from datastore.objects import ObjectFolder
    from trainer.config import read_config

    parent, _, name = url.rpartition("/")
    try:
        text = ObjectFolder(parent or ".").read(name).decode()
    except FileNotFoundError as error:
        raise AskedWrongly(f"There is no config {url}: give the config.yaml of a run folder, or a recipe.") from error
    return read_config(text, name=f"config {url}", default_job=name.removesuffix(".yaml"))


def store_url(config: "RunConfig") -> str:
    """The store that the run reads."""
    if config.data.store_url is None:
        raise AskedWrongly(
            "The config names no store. Start the run with `viewpoint launch JOB --data URL`, or write data.store_url "
            "into the config."
        )
    return config.data.store_url


def build_objective(config: "RunConfig", store: "Store") -> "Objective[Any]":
    """The objective with its first weights, which are a function of the seed: the same on every rank."""
    import torch

    from models.students import build_student
    from trainer.objectives.base import Corpus, TaughtFields

    torch.manual_seed(config.seed)
    # the student first: its weights do not depend on what the objective adds
    student = None if config.student is None else build_student(config.student)
    facts = store.corpus_facts
    teachers = dict(store.teachers)
    if (name := config.teacher) is not None:
        teachers[name] = teachers[store.resolve_teacher(name)]
    dims = {name: teacher.dim for name, teacher in teachers.items() if "view_features" in teacher.fields}
    taught = {name: TaughtFields(teacher.image_size, teacher.fields) for name, teacher in teachers.items()}
    corpus = Corpus(facts.class_names, facts.num_views, facts.image_size, facts.part_names, dims, taught)
    return config.objective.build(student, corpus)


def load_first_weights(encoder: "nn.Module", url: str) -> None:
    """Gives the encoder of a fresh run the weights of another's: of a run, one of its checkpoints, or an export."""
    from trainer.encoders import find_encoder

    theirs, ours = find_encoder(url).encoder.state_dict(), encoder.state_dict()
    differing = [
        f"{name} is {_shape(theirs, name)} there and {_shape(ours, name)} here"
        for name in {**ours, **theirs}
        if _shape(theirs, name) != _shape(ours, name)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise DoNotRetry(
            f"start_from={url} holds another network than this recipe trains: {'; '.join(differing[:3])}{more}. Give "
            f"the recipe the 'student' section of that training, or start from another one."
        )
    encoder.load_state_dict(theirs)


def _shape(state: "Mapping[str, Tensor]", name: str) -> str:
    return str(list(state[name].shape)) if name in state else "absent"


def step_seed(seed: int, step: int, rank: int) -> int:
    """Where the randomness of one step on one rank starts (dropout, drop path): no random state needs to be saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest(), "little")
