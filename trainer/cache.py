"""Stage: runs a frozen teacher over a store's shapes, once, and writes what it says of them back into the store.

Every value is a function of the teacher and of one shape alone (`describing.py`). Blocks of rows are written whole and
committed last, so the stage may be killed at any moment, and any number of processes may share the work.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from datastore.errors import EXIT_DONE, AskedWrongly, DoNotRetry, Stopped, StoreError
from datastore.progress import Progress, format_bytes, format_seconds
from datastore.schema import FIELDS, TEACHER_FIELDS
from datastore.stopping import stop_asked
from trainer.heartbeat import HEART

if TYPE_CHECKING:
    from datastore.layout import FieldStatistics, Store, TeacherAttributes
    from datastore.weights_file import WeightsFile
    from datastore.write import BlockWriter
    from models.image_models.teacher import ImageTeacher
    from trainer.describing import Describe, Words
    from trainer.teachers import Precision, TimmOptions

HELP = "run a frozen teacher over a store and keep its features there"

_TOKEN_FIELDS: Final = ("view_tokens", "view_saliency")
_FINISH_SECONDS: Final = 10.0  # a block that is done sooner than this is finished before stopping
_SPARE_BYTES: Final = 64 * 2**20  # left free on the disk: checkpoints and logs go on being written
_LONGEST_READ_SECONDS: Final = 160.0  # as a training waits for its data, by default
_READERS: Final = {"cpu": 1, "cuda": 4}  # threads that read and decode: a GPU looks at images faster than one does


@dataclass(frozen=True)
class CacheSummary:
    """What one process did, and what is in the store now."""

    store: str
    teacher: str  # name@hash8
    fields: tuple[str, ...]
    rows: int  # described by this process
    images: int
    seconds: float
    is_complete: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("store", metavar="STORE", help="URL of the store to read shapes from and to write to")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        required=True,
        help="name that the features lie under; also the timm model, where --model names none",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights",
        metavar="FOLDER|FILE|hub",
        help="path or URL of an exported image model or of a weights file of the timm model; hub: timm's own weights",
    )
    source.add_argument(
        "--random-weights", action="store_true", help="no weights at all: the timm model as it is initialised"
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        choices=TEACHER_FIELDS,
        metavar="FIELD",
        help=f"what to write: {', '.join(TEACHER_FIELDS)} (default: the teacher's first; with --tokens those, too)",
    )
    parser.add_argument(
        "--tokens",
        type=_token_grid,
        metavar="14x14|7x7|native|none",
        help="patch tokens and their saliency, averaged to such a grid; native: as many as the network has",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the network (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="SHAPES",
        help="shapes read at a time; bounds memory, changes no value (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    timm = parser.add_argument_group("of a timm model", "By default, all is as the model was made for.")
    timm.add_argument("--model", metavar="NAME", help="which one, if not the one named by --teacher")
    timm.add_argument("--image-size", type=int, metavar="PIXELS", help="input size")
    timm.add_argument("--mean", nargs=3, type=float, metavar=("R", "G", "B"), help="subtracted from images from 0 to 1")
    timm.add_argument("--std", nargs=3, type=float, metavar=("R", "G", "B"), help="that they are divided by then")
    timm.add_argument(
        "--projection",
        type=int,
        metavar="WIDTH",
        help="features and tokens go through the network's last linear layer, of this width: 512 for CLIP ViT-B/16",
    )
    timm.add_argument(
        "--from-points",
        action="store_true",
        help="look at three depth images of the points, as I2P-MAE does, and not at the store's views",
    )


def _token_grid(text: str) -> int | Literal["native", "none"]:
    if text in ("native", "none"):
        return text  # type: ignore[return-value]
    rows, _, columns = text.partition("x")
    if not rows.isdecimal() or rows != columns or int(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no square grid such as 14x14, nor native, nor none")
    return int(rows)


def run(arguments: argparse.Namespace) -> int:
    """Describes this process's part of the store: block i of every n under torchrun, all of it otherwise."""
    from datastore.layout import open_store
    from trainer.distributed import World, uses_gpu
    from trainer.teachers import fields_offered, load_teacher

    HEART.start()
    if arguments.batch < 1:
        raise AskedWrongly(f"--batch counts shapes, one at least; got {arguments.batch}.")
    world = World.from_env()
    store = open_store(arguments.store)
    teacher, training = load_teacher(arguments.weights, _timm_options(arguments))
    if arguments.random_weights and world.is_first:
        print(
            f"viewpoint: teacher {arguments.teacher} has random weights, as asked: its features carry no knowledge.",
            file=sys.stderr,
        )
    summary = cache(
        store,
        teacher,
        arguments.teacher,
        training=training,
        fields=_fields(arguments, fields_offered(store, teacher)),
        part=(world.rank, world.size),
        batch=arguments.batch,
        device=f"cuda:{world.local_rank}" if uses_gpu() else "cpu",
        precision=arguments.precision,
        options=_as_typed(arguments),
        weights_files=weights_files(arguments.weights),
    )
    print(json.dumps(asdict(summary)) if arguments.json else describe(summary), flush=True)
    return EXIT_DONE


def weights_files(weights: str | None) -> "tuple[WeightsFile, ...]":
    """The files on this machine's disk that `--weights` names."""
    from datastore.weights_file import WeightsFile
    from models.image_models.trunk import HUB

    if weights is None or weights == HUB or "://" in weights:
        return ()
    path = Path(weights)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return tuple(WeightsFile.of(file) for file in files)


def _timm_options(arguments: argparse.Namespace) -> "TimmOptions":
    from trainer.teachers import TimmOptions

    asked = [field for field in _TOKEN_FIELDS if field in (arguments.fields or ())]
    if arguments.tokens == "none" and asked:
        raise AskedWrongly(f"--tokens none, and --fields {asked[0]}: leave one of the two out.")
    if arguments.tokens not in (None, "none", "native") and arguments.from_points:
        raise AskedWrongly("--from-points keeps the tokens that the network has: leave --tokens out.")
    tokens = None if arguments.tokens == "none" else arguments.tokens
    return TimmOptions(
        model=arguments.model or arguments.teacher,
        image_size=arguments.image_size,
        mean=arguments.mean and tuple(arguments.mean),
        std=arguments.std and tuple(arguments.std),
        projection=arguments.projection,
        tokens=tokens or ("native" if asked else None),
        from_points=arguments.from_points,
    )


def _fields(arguments: argparse.Namespace, offered: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Those asked for; else the first, and those that `--tokens` asks for."""
    if arguments.fields:
        return tuple(arguments.fields)
    tokens = () if arguments.tokens in (None, "none") else tuple(field for field in _TOKEN_FIELDS if field in offered)
    return tuple(dict.fromkeys((*tuple(offered)[:1], *tokens)))


def _as_typed(arguments: argparse.Namespace) -> str:
    """The options that decide what is written, as somebody would type them again."""
    words = ["--random-weights"] if arguments.random_weights else ["--weights", arguments.weights]
    for option in ("model", "image_size", "mean", "std", "projection", "fields", "tokens"):
        value = getattr(arguments, option)
        if value is not None:
            said = f"{value}x{value}" if option == "tokens" and isinstance(value, int) else value
            words += [f"--{option.replace('_', '-')}", *map(str, said if isinstance(said, list) else [said])]
    words += ["--from-points"] * arguments.from_points
    words += ["--precision", arguments.precision] * (arguments.precision != "float32")
    return shlex.join(words)


def cache(
    store: "Store",
    teacher: "ImageTeacher",
    name: str,
    *,
    training: Mapping[str, str] | None = None,
    fields: tuple[str, ...] | None = None,
    part: tuple[int, int] = (0, 1),
    batch: int = 32,
    device: str = "cpu",
    precision: "Precision" = "float32",
    options: str = "",
    weights_files: "tuple[WeightsFile, ...]" = (),
    stop: threading.Event | None = None,
) -> CacheSummary:
    """Writes the blocks of this part that nobody has written, and publishes them.

    `fields`: the teacher's first by default. `training`: what made the teacher; `options`: of the command, for people;
    `weights_files`: where its weights came from.
    Stopped when `stop` is set or, without one, on SIGINT and SIGTERM: whole blocks are kept, and the same call goes on.
    """
    from datastore.layout import create_teacher, open_store
    from datastore.write import BlockWriter, publish
    from trainer.describing import describer, shapes_together
    from trainer.teachers import fields_offered, teacher_attributes

    began = time.monotonic()
    store.field(teacher.reads)
    attributes = teacher_attributes(store, teacher, name, fields, training or {}, precision, options)
    attributes = attributes.model_copy(update={"weights_files": weights_files})
    num_views = next(iter(fields_offered(store, teacher).values()))[0]
    writer = BlockWriter(store, create_teacher(store, attributes))
    pending = writer.pending(part)
    _refuse_full_disk(store, attributes, writer.pending())
    rows = sum(end - first for first, end in map(store.block_range, pending))
    if pending:
        if part[0] == 0:
            print(f"viewpoint: {_estimate(store, attributes, writer.pending())}", file=sys.stderr)
        together = shapes_together(device, num_views)
        slices = _slices(store, pending, -(-batch // together) * together)
        with (
            stop_asked(stop) as stop_event,
            describer(teacher, tuple(attributes.fields), device, precision, num_views) as describe_shapes,
        ):
            described = _described(store, teacher.reads, slices, describe_shapes, _READERS[device.partition(":")[0]])
            try:
                _write_blocks(writer, slices, described, part, num_views, stop_event)
            finally:
                described.close()
                publish(store)
    else:
        publish(store)  # a writer killed between its last commit and its publishing left this to do
    return CacheSummary(
        store=store.url,
        teacher=attributes.key,
        fields=tuple(attributes.fields),
        rows=rows,
        images=rows * num_views,
        seconds=time.monotonic() - began,
        is_complete=attributes.key in open_store(store.url).teachers,
    )


def describe(summary: CacheSummary) -> str:
    """The summary for people."""
    where = f"{', '.join(summary.fields)} of teacher {summary.teacher}"
    if not summary.rows:
        return f"Nothing to do: {summary.store} has {where} for all shapes of this part."
    rate = summary.images / summary.seconds
    text = f"Wrote {where} for {summary.rows:,} shapes in {format_seconds(summary.seconds)}, {rate:,.0f} images/s."
    return text if summary.is_complete else f"{text} Other parts are still missing; readers wait for them."


def _row_bytes(teacher: "TeacherAttributes") -> int:
    return sum(prod(sizes) * np.dtype(FIELDS[field].dtype).itemsize for field, sizes in teacher.fields.items())


def _num_rows(store: "Store", blocks: list[int]) -> int:
    return sum(end - first for first, end in map(store.block_range, blocks))


def _estimate(store: "Store", teacher: "TeacherAttributes", blocks: list[int]) -> str:
    rows, row_bytes = _num_rows(store, blocks), _row_bytes(teacher)
    return (
        f"{', '.join(teacher.fields)} of teacher {teacher.key} for {rows:,} shapes take about "
        f"{format_bytes(rows * row_bytes)}, {row_bytes:,} bytes a shape."
    )


def _refuse_full_disk(store: "Store", teacher: "TeacherAttributes", blocks: list[int]) -> None:
    """DoNotRetry where the local disk has less room than what is still to be written; object storage cannot tell."""
    needed = _row_bytes(teacher) * _num_rows(store, blocks)
    if not store.folder.is_local or needed == 0:
        return
    free = shutil.disk_usage(store.folder.local_path).free
    if needed + _SPARE_BYTES > free:
        raise DoNotRetry(
            f"{store.url}: features of teacher {teacher.key} take {_megabytes(needed)} more, and its disk has "
            f"{_megabytes(free)} free, of which {_megabytes(_SPARE_BYTES)} stay free. Make room, or move the store."
        )


@dataclass(frozen=True)
class _Slice:
    """Neighbouring rows of one block that are read and described together."""

    block: int
    first: int
    end: int
    block_end: int

    @property
    def closes_block(self) -> bool:
        return self.end == self.block_end


def _slices(store: "Store", blocks: list[int], rows: int) -> list[_Slice]:
    """The rows of the blocks in pieces of so many: whole groups of a GPU, so that groups do not depend on them."""
    return [
        _Slice(block, first, min(first + rows, end), end)
        for block in blocks
        for start, end in [store.block_range(block)]
        for first in range(start, end, rows)
    ]


def _described(
    store: "Store", field: str, slices: list[_Slice], describe_shapes: "Describe", num_readers: int
) -> "Generator[tuple[_Slice, Words], None, None]":
    """Each slice with what the teacher says of it, while the next one is described and those behind it are read."""
    started: deque[tuple[_Slice, Callable[[], Words]]] = deque()
    for each, shapes in _read_ahead(store, field, slices, num_readers):
        started.append((each, describe_shapes(shapes)))
        if len(started) > 1:
            done, words = started.popleft()
            yield done, words()
    for done, words in started:
        yield done, words()


def _read_ahead(
    store: "Store", field: str, slices: list[_Slice], num_readers: int
) -> "Iterator[tuple[_Slice, np.ndarray]]":
    """Each slice with its shapes; those of the next ones are read meanwhile."""
    with ThreadPoolExecutor(num_readers, thread_name_prefix="cache-read") as readers:
        reading: deque[tuple[_Slice, Future[np.ndarray]]] = deque()
        for following in slices:
            reading.append((following, readers.submit(store.read, field, range(following.first, following.end))))
            if len(reading) > num_readers:
                yield _read(*reading.popleft())
        for each, shapes in reading:
            yield _read(each, shapes)


def _read(each: _Slice, shapes: "Future[np.ndarray]") -> tuple[_Slice, np.ndarray]:
    """A slice with its shapes; who waits for storage that has trouble does not hang."""
    with HEART.waiting_for_data(_LONGEST_READ_SECONDS):
        return each, shapes.result()


def _write_blocks(
    writer: "BlockWriter",
    slices: list[_Slice],
    described: "Iterator[tuple[_Slice, Words]]",
    part: tuple[int, int],
    num_views: int,
    stop: threading.Event,
) -> None:
    """Writes and commits block by block; what is stopped within a block is redone with it."""
    from datastore.layout import INGEST

    store = writer.store
    holds_shape = np.zeros(len(store), bool)
    holds_shape[store.rows()] = True
    blocks = [block for block in store.manifest.scope(INGEST).blocks if block % part[1] == part[0]]
    total = _num_rows(store, blocks)
    done = committed = total - sum(each.end - each.first for each in slices)
    opened = None
    with Progress("cache", total, "shapes", resumed=done) as progress:
        for number, (each, words) in enumerate(described, start=1):
            if opened is None:
                opened, spread = writer.open_block(each.block), _Spread(writer)
            here = holds_shape[each.first : each.end]
            for values in words.values():
                values[~here] = 0
            spread.add(words, here, each.first)
            opened.append(words)
            done += each.end - each.first
            progress.done = done  # before its rate is asked for
            progress.update(done, **{"images/s": progress.rate * num_views})
            HEART.beat(number)
            if each.closes_block:
                HEART.enter("checkpoint")
                opened.commit(statistics=spread.statistics())
                opened, committed = None, done
                HEART.beat(number)
            soon_whole = 0 < each.block_end - each.end < _FINISH_SECONDS * progress.rate
            if stop.is_set() and done < total and not soon_whole:
                raise Stopped(
                    f"Stopped after {committed:,} of {total:,} shapes, whose features are safe in {store.url}. "
                    f"The same command goes on from there."
                )


class _Spread:
    """What the values of a block are like. The same, to the bit, however the block is cut into slices."""

    def __init__(self, writer: "BlockWriter") -> None:
        self._writer = writer
        self._totals: dict[str, list[float]] = defaultdict(list)  # of each row
        self._largest: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, words: "Words", holds_shape: np.ndarray, first_row: int) -> None:
        """Takes the next rows; those without a shape do not count. StoreError for what float16 cannot hold."""
        for field, values in words.items():
            if values.dtype != np.float16:
                continue
            wide = values.reshape(len(values), -1).astype(np.float32)  # a fifth of the time of adding up float16
            totals = [float(row.sum(dtype=np.float64)) for row in wide]
            broken = [row for row, total in enumerate(totals, first_row) if not math.isfinite(total)]
            if broken:
                raise StoreError(
                    f"{self._writer.store.url}: row {broken[0]}: {field} of {self._writer.scope} has what float16 cannot "
                    f"hold: not a number, or beyond 65,504. Check the teacher's weights and its normalisation."
                )
            self._totals[field] += [total for total, whole in zip(totals, holds_shape, strict=True) if whole]
            if holds_shape.any():
                largest = float(wide[holds_shape].max())
                self._largest[field] = max(largest, self._largest[field]) if self._counts[field] else largest
                self._counts[field] += int(holds_shape.sum()) * wide.shape[1]

    def statistics(self) -> "dict[str, FieldStatistics]":
        """Of each float16 field."""
        from datastore.layout import FieldStatistics

        return {
            field: FieldStatistics(total=math.fsum(totals), largest=self._largest[field], count=self._counts[field])
            for field, totals in self._totals.items()
        }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
