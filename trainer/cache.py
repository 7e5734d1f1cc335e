"""Stage: runs a frozen teacher over a store's views, once, and writes what it says of them back into the store.

Every value is a function of the teacher's weights and of one shape's views alone: on CPU each shape goes through the
network by itself on one thread, and shapes are spread over threads. Larger batches, or more threads in one product,
would change the order of sums and with it last bits (measured: up to 3e-6), so that a store would depend on how it was
made. It is no slower: 55 images/s for MobileNetV2 at 224 pixels on two cores, against 45 with batches of 48 images. On
a GPU a fixed number of shapes, counted from the first row of a block, goes through together.
"""

import argparse
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from datastore.errors import EXIT_DONE, AskedWrongly, DoNotRetry, Stopped, StoreError
from datastore.progress import Progress, format_seconds
from datastore.stopping import stop_asked

if TYPE_CHECKING:
    from datastore.layout import Store, TeacherAttributes
    from datastore.write import BlockWriter
    from models.image_models.teacher import ImageTeacher

DescribeViews = Callable[[np.ndarray], np.ndarray]
"""Views of some shapes -> their features, a row a shape."""

HELP = "run a frozen teacher over a store and keep its features there"

FIELDS: Final = ("view_features",)
"""What the teachers that exist can say of a view."""

_GPU_SHAPES: Final = 8  # that go through a GPU together: 96 images of twelve views
_FINISH_SECONDS: Final = 10.0  # a block that is done sooner than this is finished before stopping
_SPARE_BYTES: Final = 64 * 2**20  # left free on the disk: checkpoints and logs go on being written


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
    parser.add_argument("store", metavar="STORE", help="URL of the store to read views from and to write features to")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        required=True,
        help="name that the features lie under; a timm model's where --weights is a file",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights", metavar="FOLDER|FILE", help="an exported image model, or a weights file of the timm model NAME"
    )
    source.add_argument(
        "--random-weights", action="store_true", help="no weights at all: the timm model NAME as it is initialised"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="input size of a timm model (default: the one that it was made for)",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        choices=FIELDS,
        default=list(FIELDS),
        metavar="FIELD",
        help=f"what to write: {', '.join(FIELDS)}",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="SHAPES",
        help="shapes read at a time; bounds memory, changes no value (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Describes this process's part of the store: block i of every n under torchrun, all of it otherwise."""
    from datastore.layout import open_store
    from trainer.distributed import World

    if arguments.batch < 1:
        raise AskedWrongly(f"--batch counts shapes, one at least; got {arguments.batch}.")
    world = World.from_env()
    store = open_store(arguments.store)
    teacher, training = load_teacher(arguments.teacher, arguments.weights, arguments.image_size)
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
        fields=tuple(arguments.fields),
        part=(world.rank, world.size),
        batch=arguments.batch,
        device=f"cuda:{world.local_rank}" if _has_gpu() else "cpu",
    )
    print(json.dumps(asdict(summary)) if arguments.json else describe(summary), flush=True)
    return EXIT_DONE


def cache(
    store: "Store",
    teacher: "ImageTeacher",
    name: str,
    *,
    training: Mapping[str, str] | None = None,
    fields: tuple[str, ...] = FIELDS,
    part: tuple[int, int] = (0, 1),
    batch: int = 32,
    device: str = "cpu",
    stop: threading.Event | None = None,
) -> CacheSummary:
    """Writes the blocks of this part that nobody has written, and publishes them; `training`: what made the teacher.

    Stopped when `stop` is set or, without one, on SIGINT and SIGTERM: whole blocks are kept, and the same call goes on.
    """
    from datastore.layout import create_teacher, open_store
    from datastore.write import BlockWriter, publish

    began = time.monotonic()
    attributes = teacher_attributes(store, teacher, name, fields, training or {})
    scope = create_teacher(store, attributes)
    writer = BlockWriter(store, scope)
    pending = writer.pending(part)
    _refuse_full_disk(store, attributes, writer.pending())
    rows = sum(end - first for first, end in map(store.block_range, pending))
    if pending:
        with stop_asked(stop) as stop_event, _describer(teacher, device) as describe_views:
            try:
                _write_blocks(writer, pending, describe_views, batch, part, stop_event)
            finally:
                publish(store)
    else:
        publish(store)  # a writer killed between its last commit and its publishing left this to do
    return CacheSummary(
        store=store.url,
        teacher=attributes.key,
        fields=fields,
        rows=rows,
        images=rows * store.attributes.num_views,
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


def load_teacher(
    name: str, weights: str | None, image_size: int | None = None
) -> tuple["ImageTeacher", Mapping[str, str]]:
    """The teacher in an exported folder, or a timm model with a file's weights (None: random, from a fixed seed).

    With it comes what an exported folder says of its training, so that a report can tell what the teacher has seen.
    """
    import torch

    from models.exported import CONFIG_FILE, load
    from models.image_models.teacher import ImageTeacher
    from trainer.fetched import fetched

    try:
        if weights is None:
            # each process builds its own: without a seed, they would write different teachers
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _pooled_trunk(name, None, image_size), {}
        with fetched(weights) as path:
            if not path.exists():
                raise AskedWrongly(f"--weights {weights}: nothing is there. Give an exported folder or a weights file.")
            if not path.is_dir():
                return _pooled_trunk(name, path, image_size), {}
            if not (path / CONFIG_FILE).is_file():
                raise AskedWrongly(
                    f"--weights {weights} is a folder without {CONFIG_FILE}, so it is no exported model. Give what "
                    f"`viewpoint export RUN DIR` wrote, or a weights file of a timm model."
                )
            teacher = load(path)
            training = _training_facts(json.loads((path / CONFIG_FILE).read_text()))
    except ValueError as error:
        raise DoNotRetry(str(error)) from error
    if not isinstance(teacher, ImageTeacher):
        raise AskedWrongly(
            f"--weights {weights} holds a network that reads no views, a point encoder or a generator. Give the export of "
            f"an image model, such as that of job pointmcd_teacher."
        )
    if image_size not in (None, teacher.image_size):
        raise AskedWrongly(
            f"--weights {weights} was trained on {teacher.image_size} pixels: leave --image-size {image_size} out."
        )
    return teacher, training


def _training_facts(description: Mapping[str, Any]) -> Mapping[str, str]:
    """What does not change when the same weights are exported again."""
    training, store = description.get("training", {}), description.get("store", {})
    facts = {key: training.get(key) for key in ("job", "config_hash", "split")}
    facts["source_hash"] = store.get("source_hash")
    return {key: value for key, value in facts.items() if value is not None}


def _pooled_trunk(name: str, weights: Path | None, image_size: int | None) -> "ImageTeacher":
    """A timm model up to its pooled features, with the input size and normalisation that it was made for."""
    import timm

    from models.image_models.pooled import PooledTrunkConfig
    from models.image_models.trunk import TrunkConfig

    try:
        made_for = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of a known network, but with an unknown tag
        made_for = None
    if made_for is None:
        raise AskedWrongly(
            f"timm {timm.__version__} has no model {name!r}. --teacher names one, unless --weights is the folder of an "
            f"exported model."
        )
    trunk = TrunkConfig(
        name=name,
        image_size=image_size or made_for.input_size[-1],
        mean=cast(tuple[float, float, float], made_for.mean),
        std=cast(tuple[float, float, float], made_for.std),
        weights=None if weights is None else str(weights),
    )
    return PooledTrunkConfig(trunk=trunk).build().eval().requires_grad_(False)


def teacher_attributes(
    store: "Store",
    teacher: "ImageTeacher",
    name: str,
    fields: tuple[str, ...] = FIELDS,
    training: Mapping[str, str] = MappingProxyType({}),
) -> "TeacherAttributes":
    """Who this teacher is, in the words of the store."""
    from pydantic import ValidationError

    from datastore.layout import TeacherAttributes

    mean, std = (tuple(float(value) for value in values.flatten()) for values in (teacher.mean, teacher.std))
    sizes = teacher.field_sizes(store.attributes.num_views)
    try:
        return TeacherAttributes(
            name=name,
            weights_hash=_weights_hash(teacher, mean, std),
            image_size=teacher.image_size,
            mean=mean,
            std=std,
            fields={field: sizes[field] for field in fields},
            dim=sizes["view_features"][-1],
            training=dict(training),
        )
    except ValidationError as error:
        raise AskedWrongly(
            f"--teacher {name!r} cannot be a folder's name: use letters, digits, '_', '.' and '-'."
        ) from error


def _weights_hash(teacher: "ImageTeacher", mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """SHA-256 over all that decides what the teacher says: names, shapes and values of the weights, and its input."""
    digest = hashlib.sha256(json.dumps([teacher.image_size, mean, std]).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _refuse_full_disk(store: "Store", teacher: "TeacherAttributes", blocks: list[int]) -> None:
    """DoNotRetry where the local disk has less room than what is still to be written; object storage cannot tell."""
    row_bytes = sum(2 * prod(sizes) for sizes in teacher.fields.values())
    needed = row_bytes * sum(end - first for first, end in map(store.block_range, blocks))
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


def _write_blocks(
    writer: "BlockWriter",
    blocks: list[int],
    describe_views: DescribeViews,
    batch: int,
    part: tuple[int, int],
    stop: threading.Event,
) -> None:
    """Describes and commits block by block; what is stopped within a block is redone with it."""
    from datastore.layout import INGEST

    store = writer.store
    slices = _slices(store, blocks, batch)
    holds_shape = set(store.rows().tolist())
    total = sum(
        end - first
        for block in store.manifest.scope(INGEST).blocks
        if block % part[1] == part[0]
        for first, end in [store.block_range(block)]
    )
    done = committed = total - sum(each.end - each.first for each in slices)
    opened = None
    with Progress("cache", total, "shapes", resumed=done) as progress:
        for each, views in _read_ahead(store, slices):
            if opened is None:
                opened = writer.open_block(each.block)
            features = describe_views(views)
            features[[row not in holds_shape for row in range(each.first, each.end)]] = 0
            _refuse_overflow(features, writer, each.first)
            opened.append({"view_features": features})
            done += each.end - each.first
            progress.update(done, **{"images/s": progress.rate * store.attributes.num_views})
            if each.closes_block:
                opened.commit()
                opened, committed = None, done
            soon_whole = 0 < each.block_end - each.end < _FINISH_SECONDS * progress.rate
            if stop.is_set() and done < total and not soon_whole:
                raise Stopped(
                    f"Stopped after {committed:,} of {total:,} shapes, whose features are safe in {store.url}. "
                    f"The same command goes on from there."
                )


def _slices(store: "Store", blocks: list[int], batch: int) -> list[_Slice]:
    """The rows of the blocks in pieces of about `batch`: whole groups of a GPU, so that groups do not depend on it."""
    rows = -(-batch // _GPU_SHAPES) * _GPU_SHAPES
    return [
        _Slice(block, first, min(first + rows, end), end)
        for block in blocks
        for start, end in [store.block_range(block)]
        for first in range(start, end, rows)
    ]


def _read_ahead(store: "Store", slices: list[_Slice]) -> "Iterator[tuple[_Slice, np.ndarray]]":
    """Each slice with its views; those of the next one are read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="cache-read") as reader:
        reading = reader.submit(store.read, "views", range(slices[0].first, slices[0].end))
        for each, following in zip(slices, [*slices[1:], None], strict=True):
            views = reading.result()
            if following is not None:
                reading = reader.submit(store.read, "views", range(following.first, following.end))
            yield each, views


def _refuse_overflow(features: np.ndarray, writer: "BlockWriter", first: int) -> None:
    if not np.isfinite(features).all():
        row = first + int(np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))[0])
        raise StoreError(
            f"{writer.store.url}: row {row}: the teacher of {writer.scope} says what float16 cannot hold: not a "
            f"number, or beyond 65,504. Check its weights and its normalisation."
        )


@contextmanager
def _describer(teacher: "ImageTeacher", device: str) -> Iterator[DescribeViews]:
    """A function from views to features, one row a shape, that does not depend on what else is in the batch."""
    if device == "cpu":
        with _shape_by_shape(teacher) as describe_views:
            yield describe_views
    else:
        yield _in_groups(teacher, device)


@contextmanager
def _shape_by_shape(teacher: "ImageTeacher") -> Iterator[DescribeViews]:
    """Each shape on one thread, as many shapes at a time as torch may use threads."""
    import torch

    def describe_one(views: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            features: np.ndarray = teacher.describe(torch.from_numpy(views[None]))[0].half().numpy()
        return features

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # torch counts threads by the thread that asks, so each worker says it again
        with ThreadPoolExecutor(threads, "cache-describe", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda views: np.stack(list(pool.map(describe_one, views)))
    finally:
        torch.set_num_threads(threads)


def _in_groups(teacher: "ImageTeacher", device: str) -> DescribeViews:
    """So many shapes at a time, and never fewer: tensors of one size, so that the same kernels compute every shape."""
    import torch

    teacher.to(device)

    def describe_groups(views: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(views), _GPU_SHAPES):
            group = torch.from_numpy(views[first : first + _GPU_SHAPES]).to(device, non_blocking=True)
            missing = _GPU_SHAPES - len(group)
            if missing:  # at the end of the store
                group = torch.cat([group, group.new_zeros((missing, *group.shape[1:]))])
            with torch.inference_mode():
                parts.append(teacher.describe(group)[: _GPU_SHAPES - missing].half())
        features: np.ndarray = torch.cat(parts).cpu().numpy()
        return features

    return describe_groups


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
