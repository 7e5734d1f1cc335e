"""The sample contract: each field's name, axes, dtype, meaning, writer and codec.

Every other place refers to a field by its name. One row is one shape in every array. Axes: `p` points stored, `v` views,
`h w` pixels of a view, `e` extra views of `s` pixels a side, `d` features, `t` tokens; a number is a fixed length. A
store has those fields that its source and its making gave: no colours without colours, no visibility without cameras.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

SCHEMA_VERSION: Final = 4

Writer = Literal["ingest", "cache"]
Codec = Literal["none", "lz4", "zstd"]
"""`none`: for what every step reads and no codec makes much smaller: points (1.17 times by `lz4`, and half as fast to read) and
float16 features (1.1 times). `lz4`: Blosc-LZ4 with bit-shuffle, for other geometry. `zstd`: for rendered images and masks (4 to
5 times, and more where they are plain)."""


@dataclass(frozen=True)
class Field:
    """One array of a store."""

    name: str
    axes: tuple[str, ...]  # of one row, as a reader receives it
    dtype: str  # as a reader receives it
    meaning: str
    writer: Writer
    codec: Codec
    shard_rows: int  # upper bound; small corpora use smaller shards, so that interrupted work loses little
    chunk_rows: int
    bit_packed: bool = False  # stored as uint8, eight values of the last axis a byte, lowest bit first


def _geometry(name: str, axes: tuple[str, ...], dtype: str, meaning: str, codec: Codec = "lz4") -> Field:
    return Field(name, axes, dtype, meaning, "ingest", codec, shard_rows=1024, chunk_rows=16)


def _images(name: str, axes: tuple[str, ...], dtype: str, meaning: str) -> Field:
    return Field(name, axes, dtype, meaning, "ingest", "zstd", shard_rows=256, chunk_rows=16)


def _fact(name: str, axes: tuple[str, ...], dtype: str, meaning: str) -> Field:
    return Field(name, axes, dtype, meaning, "ingest", "none", shard_rows=1024, chunk_rows=1024)


def _taught(name: str, axes: tuple[str, ...], meaning: str) -> Field:
    return Field(name, axes, "float16", meaning, "cache", "none", shard_rows=4096, chunk_rows=64)


_INGEST = (
    _geometry("points", ("p", "3"), "float32", "surface samples in the unit ball, in farthest-point order", "none"),
    _geometry("normals", ("p", "3"), "float16", "unit surface normal at each point", "none"),
    _geometry("colours", ("p", "3"), "uint8", "surface colour at each point, RGB", "zstd"),
    _geometry("part_labels", ("p",), "int16", "part of each point, index into part_names; -1 unknown", "zstd"),
    _images("views", ("v", "h", "w", "3"), "uint8", "images of the shape, RGB on white"),
    _images(
        "depth",
        ("v", "h", "w"),
        "uint16",
        "distance from the camera plane: 0 nothing hit, else 1 + 65534 * (d - near) / (far - near)",
    ),
    replace(
        _geometry("visibility", ("p", "v"), "bool", "whether nothing lies between the point and the camera", "zstd"),
        bit_packed=True,
    ),
    _geometry(
        "pixels",
        ("p", "v", "2"),
        "int16",
        "column and row of each point in each view; may lie outside the image",
    ),
    _geometry(
        "cameras",
        ("v", "8"),
        "float32",
        "the source's own cameras: azimuth, elevation, in-plane rotation, distance, field of view, shift x, y, z; "
        "degrees, not a number where the source does not say",
    ),
    replace(
        _images(
            "extra_views", ("e", "s", "s", "3"), "uint8", "more images that the source has of the shape, RGB on white"
        ),
        shard_rows=64,  # a turntable has three times as many pixels as the views
    ),
    _fact("num_extra_views", (), "int64", "how many of extra_views there are; the others are empty"),
    _fact("label", (), "int64", "index into class_names; -1 unlabelled"),
    _fact("split", (), "uint8", "index into splits; 255 quarantined or not yet written"),
    _fact("id", (), "string", "the source's own name of the shape"),
    _fact("licence", (), "string", "licence of the shape, where the source states one for each"),
    _fact("centre", ("3",), "float32", "source coordinates, turned to +Y up, = points * scale + centre"),
    _fact("scale", (), "float32", "radius of the source's bounding ball around centre"),
)

_CACHE = (
    _taught("view_features", ("v", "d"), "the teacher's descriptor of each view"),
    replace(
        _taught("view_tokens", ("v", "t", "d"), "the teacher's patch features of each view, row by row"),
        chunk_rows=16,  # a row is half a megabyte and more
    ),
    _taught("view_saliency", ("v", "t"), "the teacher's attention to each patch"),
    replace(
        _geometry(
            "view_pixels", ("p", "v", "2"), "int16", "column and row of each point in the views that the teacher drew"
        ),
        writer="cache",
    ),
)

FIELDS: Final[dict[str, Field]] = {field.name: field for field in (*_INGEST, *_CACHE)}
INGEST_FIELDS: Final = tuple(field.name for field in _INGEST)
TEACHER_FIELDS: Final = tuple(field.name for field in _CACHE)

QUARANTINED: Final = 255
"""The split of a row that holds no shape: broken at ingest, or not written yet."""
