"""Stage: shapes become rows of a store, with views, depth and visibility. Run again, it does what is missing.

    source -> tasks -> worker processes (read, sample, render) -> rows in order -> one writer thread -> blocks

The rows of a block are written in order, whoever makes them first: the same source gives the same store for any number
of workers and after any number of kills.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np

from datastore.cameras import RIG_NAMES, CameraRig, rig_by_name
from datastore.errors import EXIT_DONE, AskedWrongly, SourceError, Stopped
from datastore.layout import (
    INGEST,
    PointOrder,
    QuarantinedRow,
    Store,
    StoreAttributes,
    create_store,
    default_block_rows,
)
from datastore.process_pool import Died, Limits, ProcessPool
from datastore.progress import Progress, format_seconds
from datastore.schema import INGEST_FIELDS
from datastore.shape_row import Broken, Row, RowMaker
from datastore.sources import AXES, ReadingOptions, ShapeReference, Source, format_table, open_source
from datastore.stopping import stop_asked
from datastore.write import BlockWriter, OpenBlock, publish, withdraw

HELP = "turn shapes into a store: points, views, depth, visibility"

_MEMORY_BUDGET_BYTES: Final = 256 * 2**20
"""For rows that wait for a slower one before them; workers rest when it is used up."""

ViewsChoice = Literal["auto", "rendered", "source"]

DISPENSABLE_FIELDS: Final = (
    "normals",
    "colours",
    "part_labels",
    "depth",
    "visibility",
    "pixels",
    "cameras",
    "extra_views",
)

DEFAULT_LIMIT_GIB: Final = 1.5
"""Of memory for a worker process: what the largest of ordinary meshes need, so that one giant cannot end a run."""

_NUM_POINTS: Final = 2048
_RIG: Final = "azimuth12"
_IMAGE_SIZE: Final = 224
_LEAST_IMAGE_SIZE: Final = 8
_LARGEST_ROW_BYTES: Final = 2**29
_APPEND_ROWS: Final = 16  # rows handed to the writer at a time: a chunk of most fields
_POLL_SECONDS: Final = 0.2
_LISTED: Final = 3


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did, and what it found done."""

    store_url: str
    num_rows: int  # of the whole store
    written: int  # by this run
    resumed: int  # of this run's part, by earlier runs
    seconds: float
    is_complete: bool  # the whole store, all parts
    quarantine: list[QuarantinedRow] = field(default_factory=list)  # of the whole store

    @property
    def shapes_per_second(self) -> float:
        """0 where nothing was left to do."""
        return self.written / self.seconds if self.written else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `viewpoint ingest`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"""formats, recognised by what lies at SOURCE:
{format_table()}

examples:
  viewpoint ingest meshes/ shapes.zarr
  viewpoint ingest ModelNet40/ s3://bucket/modelnet.zarr --points 8192 --part 0/16
  viewpoint ingest modelnet40_ply_hdf5_2048/ clouds.zarr --image-size 128
  viewpoint ingest "demo://shapes?count=640&seed=0" demo.zarr --rig "ring?views=8&elevations=20" """
    parser.add_argument("source", metavar="SOURCE", help="a folder or an index, local or by URL, or demo://shapes")
    parser.add_argument("store", metavar="STORE", help="where the store lies or shall lie: a path or a URL")

    reading = parser.add_argument_group("reading the source")
    reading.add_argument("--format", metavar="F", help="the source's format, where it is not to be guessed")
    reading.add_argument("--variant", metavar="V", help="which of several data sets in one folder")
    reading.add_argument("--partial", action="store_true", help="take what is there where a data set is not whole")
    reading.add_argument("--allow-pickle", action="store_true", help="read formats that are pickles, arrays only")
    reading.add_argument(
        "--up", choices=AXES, metavar="AXIS", help=f"the source's up axis: {', '.join(AXES)} (the format's)"
    )

    making = parser.add_argument_group("making rows")
    making.add_argument(
        "--rig",
        metavar="R",
        help=f"cameras: {', '.join(RIG_NAMES)}; with parameters, as in ring?views=8&elevations=30,-30 ({_RIG})",
    )
    making.add_argument("--image-size", type=int, metavar="PX", help=f"of each rendered view ({_IMAGE_SIZE})")
    making.add_argument(
        "--points",
        type=int,
        metavar="N",
        help=f"on each shape (as many as the source's clouds have, else {_NUM_POINTS})",
    )
    making.add_argument(
        "--views",
        choices=get_args(ViewsChoice),
        default="auto",
        help="render views, or take the source's own; auto takes them where it has them",
    )
    making.add_argument(
        "--point-order",
        choices=get_args(PointOrder),
        default="farthest",
        help="of clouds: re-ordered so that every beginning is a good sample, or as the source has it",
    )
    making.add_argument(
        "--without", metavar="FIELD,...", default="", help=f"fields to leave out: {', '.join(DISPENSABLE_FIELDS)}"
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--part", default="0/1", metavar="i/n", help="write only part i of n, counted from 0 (%(default)s)"
    )
    running.add_argument("--workers", type=int, metavar="W", help="worker processes (one a core)")
    running.add_argument(
        "--strict", action="store_true", help="fail on the first broken shape instead of leaving it out"
    )
    running.add_argument(
        "--retry-quarantined", action="store_true", help="do those blocks again in which shapes were left out"
    )
    running.add_argument(
        "--limit-seconds-per-shape",
        type=float,
        default=60.0,
        metavar="S",
        help="slower ones are left out (%(default)s)",
    )
    running.add_argument(
        "--limit-gib-per-worker",
        type=float,
        default=DEFAULT_LIMIT_GIB,
        metavar="G",
        help="shapes that need more memory are left out (%(default)s)",
    )
    running.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """The exit code of `viewpoint ingest`."""
    for option in ("points", "workers", "limit_seconds_per_shape", "limit_gib_per_worker"):
        value = getattr(arguments, option)
        if value is not None and not value > 0:
            raise AskedWrongly(f"--{option.replace('_', '-')} must be above zero, not {value}.")
    if arguments.image_size is not None and arguments.image_size < _LEAST_IMAGE_SIZE:
        raise AskedWrongly(f"--image-size must be {_LEAST_IMAGE_SIZE} pixels or more, not {arguments.image_size}.")
    options = ReadingOptions(arguments.partial, arguments.allow_pickle, arguments.variant, arguments.up)
    source = open_source(arguments.source, arguments.format, options)
    print(f"{source.url}: {describe_listing(source)}", file=sys.stderr)
    if source.listing.images is not None and arguments.views == "auto" and (arguments.rig or arguments.image_size):
        raise AskedWrongly(
            f"{source.url} ({source.FORMAT}) brings its own images, and --rig and --image-size are for rendered ones. Add "
            f"--views rendered to render, or --views source to take its images whatever the rig."
        )
    summary = ingest(
        source,
        arguments.store,
        rig=rig_by_name(arguments.rig or _RIG, arguments.image_size or _IMAGE_SIZE),
        num_points=arguments.points,
        views=arguments.views,
        point_order=arguments.point_order,
        without=[name.strip() for name in arguments.without.split(",") if name.strip()],
        part=parse_part(arguments.part),
        num_workers=arguments.workers,
        strict=arguments.strict,
        retry_quarantined=arguments.retry_quarantined,
        seconds_per_shape=arguments.limit_seconds_per_shape,
        gib_per_worker=arguments.limit_gib_per_worker,
    )
    print(json.dumps(_as_record(summary)) if arguments.json else describe(summary))
    return EXIT_DONE


def parse_part(text: str) -> tuple[int, int]:
    """`"0/4"` as (0, 4). AskedWrongly where it is no such thing."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise AskedWrongly(f"--part is i/n with i from 0 to n - 1, as in 0/4; it is {text!r}.")
    return int(index), int(count)


def ingest(
    source: Source,
    store_url: str,
    *,
    rig: CameraRig,
    num_points: int | None = None,
    views: ViewsChoice = "auto",
    point_order: PointOrder = "farthest",
    without: Collection[str] = (),
    part: tuple[int, int] = (0, 1),
    num_workers: int | None = None,
    strict: bool = False,
    retry_quarantined: bool = False,
    seconds_per_shape: float = 60.0,
    gib_per_worker: float = DEFAULT_LIMIT_GIB,
    stop: threading.Event | None = None,
) -> IngestSummary:
    """Writes the blocks of this part that nobody has written, and publishes them.

    Stopped when `stop` is set or, without one, on SIGINT and SIGTERM: whole blocks are kept, and the same call goes on.
    SourceError where `strict` is asked for and a shape is broken, or where not one of all shapes could be used.
    """
    began = time.monotonic()
    attributes = _attributes(source, rig, num_points, views, point_order)
    fields = _fields_of(source, attributes, without)
    store = create_store(store_url, attributes, fields)
    if retry_quarantined:
        _withdraw_quarantined(store, part)
    writer = BlockWriter(store, INGEST)
    pending = writer.pending(part)
    rows = [row for block in pending for row in range(*store.block_range(block))]
    resumed = sum(
        last - first for first, last in map(store.block_range, range(part[0], store.num_blocks, part[1]))
    ) - len(rows)
    if rows:
        limits = Limits(seconds_per_shape, int(gib_per_worker * 2**30))
        maker = RowMaker(source, attributes, fields)
        with stop_asked(stop) as stop_event:
            try:
                _write_rows(writer, pending, rows, maker, num_workers, strict, limits, resumed, stop_event)
            finally:
                publish(store)
    # with nothing left to write too: a writer killed between its last commit and its publishing leaves that to do
    publish(store)
    finished = create_store(store_url, store.attributes, fields)  # again, for what is in the manifest now
    _refuse_quarantine(source, finished, strict)
    return IngestSummary(
        store_url=store.url,
        num_rows=len(store),
        written=len(rows),
        resumed=resumed,
        seconds=time.monotonic() - began,
        is_complete=finished.is_complete(INGEST),
        quarantine=finished.quarantine,
    )


def describe(summary: IngestSummary) -> str:
    """The summary for people."""
    lines = []
    if summary.written:
        before = f" ({summary.resumed:,} were there before)" if summary.resumed else ""
        lines.append(
            f"Went through {summary.written:,} shapes for {summary.store_url}{before} in {format_seconds(summary.seconds)}, "
            f"{summary.shapes_per_second:.1f} shapes/s."
        )
    else:
        lines.append(f"Nothing to do: {summary.store_url} has all {summary.resumed:,} shapes of this part.")
    if not summary.is_complete:
        lines.append("Other parts of the store are still missing; readers see what is there.")
    if summary.quarantine:
        lines.append(f"{len(summary.quarantine):,} of {summary.num_rows:,} shapes could not be used:")
        lines += quarantine_lines(summary.quarantine)
    return "\n".join(lines)


def describe_listing(source: Source) -> str:
    """What was found, in one line."""
    listing = source.listing
    splits = Counter(shape.split for shape in listing.shapes)
    counts = ", ".join(f"{splits[split]:,} {split}" for split in listing.splits)
    kind = "meshes" if listing.geometry == "mesh" else "clouds"
    images = f", {listing.images.num_views} images of each" if listing.images else ""
    return f"{source.FORMAT}, {len(listing.shapes):,} {kind} in {len(listing.class_names)} classes ({counts}){images}"


def quarantine_lines(quarantine: Sequence[QuarantinedRow]) -> list[str]:
    """One line a reason, the commonest first, with the first few shapes that it met."""
    by_reason: dict[str, list[str]] = {}
    for entry in quarantine:
        by_reason.setdefault(entry.reason, []).append(entry.id)
    return [
        f"  {len(ids):,}  {reason}: {', '.join(ids[:_LISTED])}{' ...' if len(ids) > _LISTED else ''}"
        for reason, ids in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]


def _fields_of(source: Source, attributes: StoreAttributes, without: Collection[str]) -> tuple[str, ...]:
    """What the store will hold: what the source and its views give, less what is not wanted."""
    if unknown := sorted(set(without) - set(DISPENSABLE_FIELDS)):
        raise AskedWrongly(
            f"--without {', '.join(unknown)}: fields that can be left out are {', '.join(DISPENSABLE_FIELDS)}."
        )
    listing, images = source.listing, source.listing.images
    rendered = attributes.rig is not None
    given = {
        "normals": listing.geometry == "mesh" or listing.with_normals,
        "colours": listing.coloured,
        "part_labels": bool(listing.part_names),
        "depth": rendered,
        "pixels": rendered,
        "visibility": attributes.visibility_from != "nothing",
        "cameras": not rendered and images is not None and images.with_cameras,
        "extra_views": listing.extra_views is not None,
        "num_extra_views": listing.extra_views is not None and "extra_views" not in without,
        "licence": any(shape.licence for shape in listing.shapes),
    }
    return tuple(name for name in INGEST_FIELDS if given.get(name, True) and name not in without)


def _attributes(
    source: Source, rig: CameraRig, num_points: int | None, views: ViewsChoice, point_order: PointOrder
) -> StoreAttributes:
    listing = source.listing
    if num_points is not None and listing.num_points is not None and num_points > listing.num_points:
        raise AskedWrongly(
            f"{source.url} has {listing.num_points:,} points a shape, and {num_points:,} were asked for. Ask for fewer "
            f"with --points, or leave it out."
        )
    if views == "source" and listing.images is None:
        raise AskedWrongly(
            f"{source.url} ({source.FORMAT}) brings no images to take as views. Leave out --views to render them."
        )
    seen: dict[str, Any]
    if listing.images is not None and views != "rendered":
        images = listing.images
        if images.with_cameras and listing.up_axis != "+Y":
            raise AskedWrongly(
                f"{source.url} ({source.FORMAT}) states cameras around +Y, which would not be right with "
                f"{listing.up_axis} up. Leave out --up, or render with --views rendered."
            )
        seen = {
            "num_views": images.num_views,
            "image_size": images.image_size,
            "views_from": "source",
            "visibility_from": "source" if images.with_visibility else "nothing",
        }
    else:
        near, far = rig.depth_range
        is_mesh = listing.geometry == "mesh"
        seen = {
            "num_views": rig.num_views,
            "image_size": rig.image_size,
            "views_from": "rays" if is_mesh else "point splats",
            "visibility_from": "rays" if is_mesh else "hidden-point removal",
            "rig": rig,
            "depth_near": near,
            "depth_far": far,
        }
    if listing.extra_views is not None:
        seen |= {
            "extra_views": listing.extra_views.num_views,
            "extra_image_size": listing.extra_views.image_size,
        }
    points_per_shape = num_points or listing.num_points or _NUM_POINTS
    # coordinates, normals and pixels of a point, colours and depth of a pixel: the largest fields
    row_bytes = points_per_shape * (32 + 4 * seen["num_views"]) + 5 * seen["num_views"] * seen["image_size"] ** 2
    if row_bytes > _LARGEST_ROW_BYTES:
        raise AskedWrongly(
            f"A shape with {points_per_shape:,} points and {seen['num_views']:,} views of {seen['image_size']:,} pixels takes "
            f"{row_bytes / 2**30:,.1f} GiB, and {_LARGEST_ROW_BYTES / 2**30:g} GiB is the most. Lower --points, --image-size or the "
            f"number of views."
        )
    return StoreAttributes(
        num_rows=len(listing.shapes),
        points_per_shape=points_per_shape,
        block_rows=default_block_rows(len(listing.shapes)),
        class_names=listing.class_names,
        part_names=listing.part_names,
        splits=listing.splits,
        geometry=listing.geometry,
        point_order="farthest" if listing.geometry == "mesh" else point_order,
        source_up_axis=listing.up_axis,
        units=listing.units,
        source_url=source.url,
        source_format=source.FORMAT,
        source_hash=listing.hash,
        licence=listing.licence,
        **seen,
    )


def _withdraw_quarantined(store: Store, part: tuple[int, int]) -> None:
    """Blocks of this part that hold quarantined rows count as unfinished again, in every scope that covers them."""
    rows = [row for rows in store.manifest.scope(INGEST).quarantine.values() for row in rows]
    blocks = {row // store.attributes.block_rows for row in rows}
    blocks = {block for block in blocks if block % part[1] == part[0]}
    if blocks:
        withdraw(store, INGEST, sorted(blocks))


def _write_rows(
    writer: BlockWriter,
    blocks: Sequence[int],
    rows: Sequence[int],
    maker: RowMaker,
    num_workers: int | None,
    strict: bool,
    limits: Limits,
    resumed: int,
    stop: threading.Event,
) -> None:
    """Makes the given rows of the given blocks, both in order, and commits block by block."""
    shapes = maker.source.listing.shapes
    num_workers = min(num_workers or _num_cores(), len(rows))
    total = resumed + len(rows)
    row_bytes = sum(array.nbytes for array in maker.empty_row(shapes[rows[0]]).values())
    most_waiting = max(2 * num_workers, _MEMORY_BUDGET_BYTES // row_bytes)

    made: dict[int, Row] = {}
    quarantined = 0
    next_offered, next_handed = 0, 0  # indices into `rows`
    with (
        Progress("ingest", total, "shapes", resumed=resumed) as progress,
        _OrderedWriter(writer, blocks) as ordered,
        ProcessPool[ShapeReference, Row | Broken](maker, num_workers, limits) as pool,
    ):
        while next_handed < len(rows):
            if stop.is_set():
                ordered.finish()  # may complete a block
                raise Stopped(
                    f"Stopped after {resumed + ordered.committed:,} of {total:,} shapes, which are safe in "
                    f"{writer.store.url}. The same command goes on from there."
                )
            while next_offered < min(len(rows), next_handed + most_waiting):
                if not pool.offer(rows[next_offered], shapes[rows[next_offered]]):
                    break
                next_offered += 1
            for row, result in pool.results(_POLL_SECONDS):
                if isinstance(result, Broken | Died):
                    if strict:
                        raise SourceError(_broken_shape(maker.source, shapes[row].id, result.reason))
                    ordered.quarantine(QuarantinedRow(row, shapes[row].id, result.reason))
                    quarantined += 1
                    made[row] = maker.empty_row(shapes[row])
                else:
                    made[row] = result
            while next_handed < len(rows) and rows[next_handed] in made:
                ordered.append(rows[next_handed], made.pop(rows[next_handed]))
                next_handed += 1
            note = {"quarantined": quarantined} if quarantined else {}
            progress.update(resumed + next_handed + len(made), **note)
        ordered.finish()


class _OrderedWriter:
    """Puts rows that come in order into their blocks, on a thread: workers go on while it encodes and stores."""

    def __init__(self, writer: BlockWriter, blocks: Sequence[int]) -> None:
        self._writer = writer
        self._blocks = deque(blocks)
        self._open: OpenBlock | None = None
        self._rows: list[Row] = []
        self._quarantine: dict[int, list[QuarantinedRow]] = {}  # by block, until that is committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ingest-write")
        self._under_way: deque[Future[None]] = deque()
        self.committed = 0  # rows of this run that are safe

    def __enter__(self) -> "_OrderedWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def quarantine(self, entry: QuarantinedRow) -> None:
        """Keeps why a row will hold no shape."""
        self._quarantine.setdefault(entry.row // self._writer.store.attributes.block_rows, []).append(entry)

    def append(self, number: int, row: Row) -> None:
        """Takes the next row."""
        self._rows.append(row)
        _, end = self._writer.store.block_range(self._blocks[0])
        if len(self._rows) == _APPEND_ROWS or number + 1 == end:
            self._submit(self._rows, last_row=number + 1 == end)
            self._rows = []

    def finish(self) -> None:
        """Waits until all is on disk."""
        while self._under_way:
            self._under_way.popleft().result()

    def _submit(self, rows: list[Row], *, last_row: bool) -> None:
        # one batch is being written and one waits: more would only fill memory
        while len(self._under_way) >= 2 or (self._under_way and self._under_way[0].done()):
            self._under_way.popleft().result()
        self._under_way.append(self._thread.submit(self._write, self._blocks[0], rows, last_row))
        if last_row:
            self._blocks.popleft()

    def _write(self, block: int, rows: list[Row], last_row: bool) -> None:
        if self._open is None:
            self._open = self._writer.open_block(block)
        self._open.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        if last_row:
            first, end = self._writer.store.block_range(block)
            self._open.commit(self._quarantine.pop(block, []))
            self._open = None
            self.committed += end - first


def _num_cores() -> int:
    """Cores that this process may use, which a container or a queue may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_quarantine(source: Source, store: Store, strict: bool) -> None:
    """SourceError where the broken shapes are more than the caller accepts."""
    if not store.quarantine:
        return
    first = store.quarantine[0]
    if strict:
        raise SourceError(_broken_shape(source, first.id, first.reason))
    if len(store.quarantine) == len(store):
        lines = "\n".join(quarantine_lines(store.quarantine))
        raise SourceError(f"{source.url}: not one of its {len(store):,} shapes could be used:\n{lines}")


def _broken_shape(source: Source, shape_id: str, reason: str) -> str:
    return (
        f"{source.url}: shape {shape_id!r} cannot be used: {reason}. Mend or remove it, or leave out --strict: "
        f"then broken shapes are left out and listed."
    )


def _as_record(summary: IngestSummary) -> dict[str, Any]:
    return asdict(summary) | {"shapes_per_second": summary.shapes_per_second}
