"""The samples that every system reads, and each system's own files of them.

    python -m readers.payloads FOLDER PAYLOAD NUM_SAMPLES SYSTEM

Sample i is a function of i and of a few shapes of the demo corpus, which our own ingest sampled and rendered: so every
system writes the same values, and a reader can be checked. A file format is one function; `WRITERS` lists them.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np

NUM_SHAPES: Final = 64
NUM_POINTS: Final = 8192
NUM_VIEWS: Final = 4
IMAGE_SIZE: Final = 224
BATCH: Final = 64

_SHARD_BYTES: Final = 64 * 2**20
"""Of the peers' files, raw: the default of mosaicml-streaming and of litdata."""


@dataclass(frozen=True)
class Payload:
    """One kind of sample."""

    name: str
    field: str  # of our schema
    shape: tuple[int, ...]
    dtype: str
    num_samples: int  # of a whole run; --quick takes fewer

    @property
    def sample_bytes(self) -> int:
        """Of one sample, decoded."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


PAYLOADS: Final = {
    payload.name: payload
    for payload in (
        Payload("points", "points", (NUM_POINTS, 3), "float32", 8192),
        Payload("views", "views", (NUM_VIEWS, IMAGE_SIZE, IMAGE_SIZE, 3), "uint8", 2048),
        Payload("features", "view_features", (12, 768), "float16", 32768),
    )
}

ZSTD_SYSTEMS: Final = ("mosaicml zstd", "litdata zstd", "webdataset zstd")
"""Beside the raw formats, for the payload that a codec makes smaller."""


def systems_of(payload: str) -> tuple[str, ...]:
    """Every set of files that a payload is written as."""
    raw = ("ours", "mosaicml", "litdata", "webdataset")
    return (*raw, *ZSTD_SYSTEMS) if payload == "views" else raw


def folder_of(folder: Path, payload: str, system: str) -> Path:
    """Where a system's files of a payload lie; the server's bucket is the folder `bucket`."""
    return folder / "bucket" / payload / system.replace(" ", "-")


def make_shapes(folder: Path) -> None:
    """Renders the shapes that samples are made of, unless that was done."""
    from datastore.cameras import rig_by_name
    from datastore.ingest import ingest
    from datastore.layout import open_store
    from datastore.sources import open_source

    if (folder / "shapes.npz").exists():
        return
    url = str(folder / "shapes.zarr")
    ingest(
        open_source(f"demo://shapes?count={NUM_SHAPES}&seed=0"),
        url,
        rig=rig_by_name(f"ring?views={NUM_VIEWS}&elevations=20", image_size=IMAGE_SIZE),
        num_points=NUM_POINTS,
    )
    store = open_store(url)
    rows = store.rows()
    with (folder / "shapes.draft").open("wb") as draft:
        np.savez(draft, points=store.read("points", rows), views=store.read("views", rows))
    (folder / "shapes.draft").rename(folder / "shapes.npz")
    shutil.rmtree(url)


def samples(folder: Path, payload: Payload, numbers: np.ndarray) -> np.ndarray:
    """The samples of these numbers."""
    return np.stack([_sample(folder, payload.name, int(number)) for number in numbers])


def _sample(folder: Path, payload: str, number: int) -> np.ndarray:
    if payload == "features":
        return np.random.default_rng([1, number]).standard_normal((12, 768), dtype=np.float32).astype(np.float16)
    shapes = _shapes(folder, payload)
    shape, variant = shapes[number % len(shapes)], number // len(shapes)
    if payload == "points":
        angle = np.random.default_rng([2, number]).uniform(0, 2 * np.pi)
        sine, cosine = np.sin(angle), np.cos(angle)
        turned: np.ndarray = shape @ np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]], dtype=np.float32)
        return turned
    # mirrored, turned, and with other colours: 48 images of each, as compressible as the first
    channels = list(permutations(range(3)))[variant // 8 % 6]
    image = shape[:, :, :: -1 if variant % 2 else 1, channels]
    return np.ascontiguousarray(np.rot90(image, variant // 2 % 4, axes=(1, 2)))


@cache
def _shapes(folder: Path, field: str) -> np.ndarray:
    with np.load(folder / "shapes.npz") as shapes:
        found: np.ndarray = shapes[field]
    return found


def write(folder: Path, payload: Payload, system: str) -> None:
    """Writes a system's files, unless they are there."""
    target = folder_of(folder, payload.name, system)
    done = target.parent / f"{target.name}.{payload.num_samples}.done"
    if done.exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    for stale in target.parent.glob(f"{target.name}.*.done"):
        stale.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[system.split()[0]](folder, payload, target, "zstd" if system.endswith("zstd") else None)
    done.touch()


def _numbered(folder: Path, payload: Payload) -> Iterator[dict[str, Any]]:
    for number in range(payload.num_samples):
        yield {"id": number, payload.field: _sample(folder, payload.name, number)}


def _write_ours(folder: Path, payload: Payload, target: Path, _: str | None) -> None:
    """A store, by the writer that ingest and cache use."""
    from numpy.dtypes import StringDType

    from datastore.layout import StoreAttributes, TeacherAttributes, create_store, create_teacher, open_store
    from datastore.schema import FIELDS
    from datastore.write import BlockWriter, publish

    is_cached = FIELDS[payload.field].writer == "cache"
    attributes = StoreAttributes(
        num_rows=payload.num_samples,
        points_per_shape=NUM_POINTS,
        block_rows=1024,
        class_names=("shape",),
        splits=("train",),
        num_views=payload.shape[0] if is_cached else NUM_VIEWS,
        image_size=IMAGE_SIZE,
        views_from="source",
        visibility_from="nothing",
        source_url="benchmark",
        source_format="benchmark",
        source_hash="0",
    )
    store = create_store(target, attributes, ["id", "split", *([] if is_cached else [payload.field])])
    writer = BlockWriter(store)
    for block in writer.pending():
        numbers = np.arange(*store.block_range(block))
        arrays = {
            "id": np.array([str(number) for number in numbers], dtype=StringDType()),
            "split": np.zeros(len(numbers), dtype=np.uint8),
        }
        if not is_cached:
            arrays[payload.field] = samples(folder, payload, numbers)
        writer.write(block, arrays)
    publish(store)
    if is_cached:
        store = open_store(target)
        teacher = TeacherAttributes(
            name="teacher", weights_hash="feedc0de", image_size=IMAGE_SIZE, mean=(0.5,), std=(0.5,),
            fields={payload.field: payload.shape}, dim=payload.shape[-1],
        )  # fmt: skip
        writer = BlockWriter(store, create_teacher(store, teacher))
        for block in writer.pending():
            writer.write(block, {payload.field: samples(folder, payload, np.arange(*store.block_range(block)))})
        publish(store)


def _write_mosaicml(folder: Path, payload: Payload, target: Path, codec: str | None) -> None:
    """MDS shards."""
    from streaming import MDSWriter

    encoding = f"ndarray:{payload.dtype}:{','.join(map(str, payload.shape))}"
    columns = {"id": "int", payload.field: encoding}
    with MDSWriter(out=str(target), columns=columns, compression=codec, size_limit=_SHARD_BYTES) as writer:
        for sample in _numbered(folder, payload):
            writer.write(sample)


class _SampleOf:
    """What litdata's writing processes call."""

    def __init__(self, folder: Path, payload: Payload) -> None:
        self.folder, self.payload = folder, payload

    def __call__(self, number: int) -> dict[str, Any]:
        return {"id": number, self.payload.field: _sample(self.folder, self.payload.name, number)}


def _write_litdata(folder: Path, payload: Payload, target: Path, codec: str | None) -> None:
    """Chunks of litdata's."""
    from litdata import optimize

    optimize(
        fn=_SampleOf(folder, payload),
        inputs=list(range(payload.num_samples)),
        output_dir=str(target),
        chunk_bytes=_SHARD_BYTES,
        compression=codec,
        num_workers=1,
        verbose=False,
    )


def _write_webdataset(folder: Path, payload: Payload, target: Path, codec: str | None) -> None:
    """Tar files. webdataset has no codec of its own that is fast and loses nothing; tars hold what one likes."""
    import io

    import webdataset
    import zstd

    target.mkdir(parents=True)
    pattern = str(target / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=_SHARD_BYTES // payload.sample_bytes, verbose=0) as writer:
        for sample in _numbered(folder, payload):
            content = io.BytesIO()
            np.save(content, sample[payload.field])
            key = f"{sample['id']:08d}"
            if codec:
                writer.write({"__key__": key, "npy.zst": zstd.compress(content.getvalue(), 3)})
            else:
                writer.write({"__key__": key, "npy": content.getvalue()})


WRITERS: Final[dict[str, Callable[[Path, Payload, Path, str | None], None]]] = {
    "ours": _write_ours,
    "mosaicml": _write_mosaicml,
    "litdata": _write_litdata,
    "webdataset": _write_webdataset,
}


def with_samples(payload: Payload, num_samples: int) -> Payload:
    """The payload with another number of samples."""
    return Payload(payload.name, payload.field, payload.shape, payload.dtype, num_samples)


if __name__ == "__main__":
    _, folder_argument, name, count, system_argument = sys.argv
    write(Path(folder_argument), with_samples(PAYLOADS[name], int(count)), system_argument)
