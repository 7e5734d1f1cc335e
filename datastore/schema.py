"""The sample contract: each field's name, axes, dtype, meaning, writer and codec.

Every other place refers to a field by its name. One row is one shape in every array. Axes: `p` points stored, `v` views,
`h w` pixels of a view, `d` features, `t` tokens; a number is a fixed length.
"""

from dataclasses import dataclass
from typing import Final, Literal

SCHEMA_VERSION: Final = 1

Writer = Literal["ingest", "cache"]
Codec = Literal["none", "lz4", "zstd"]
"""`lz4`: Blosc-LZ4 with bit-shuffle, for geometry (1.18 times smaller). `zstd`: for rendered images and masks (4 to 5 times).
`none`: for float16 features, which no codec makes more than a tenth smaller."""


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
    optional: bool = False  # a source may have none
    bit_packed: bool = False  # stored as uint8, eight values of the last axis a byte, lowest bit first


_INGEST = (
    Field(
        "points",
        ("p", "3"),
        "float32",
        "surface samples in the unit ball, in farthest-point order",
        "ingest",
        "lz4",
        1024,
        16,
    ),
    Field("normals", ("p", "3"), "float16", "unit surface normal at each point", "ingest", "lz4", 1024, 16),
    Field(
        "colours", ("p", "3"), "uint8", "surface colour at each point, RGB", "ingest", "zstd", 1024, 16, optional=True
    ),
    Field(
        "part_labels",
        ("p",),
        "int16",
        "part of each point, index into part_names; -1 unknown",
        "ingest",
        "zstd",
        1024,
        16,
        optional=True,
    ),
    Field("views", ("v", "h", "w", "3"), "uint8", "rendered images, RGB on white", "ingest", "zstd", 256, 16),
    Field(
        "depth",
        ("v", "h", "w"),
        "uint16",
        "distance from the camera plane: 0 nothing hit, else 1 + 65534 * (d - near) / (far - near)",
        "ingest",
        "zstd",
        256,
        16,
    ),
    Field(
        "visibility",
        ("p", "v"),
        "bool",
        "whether nothing lies between the point and the camera",
        "ingest",
        "zstd",
        1024,
        16,
        bit_packed=True,
    ),
    Field(
        "pixels",
        ("p", "v", "2"),
        "int16",
        "column and row of each point in each view; may lie outside the image",
        "ingest",
        "lz4",
        1024,
        16,
    ),
    Field("label", (), "int64", "index into class_names; -1 unlabelled", "ingest", "none", 1024, 1024),
    Field("split", (), "uint8", "index into splits; 255 quarantined or not yet written", "ingest", "none", 1024, 1024),
    Field("id", (), "string", "the source's own name of the shape", "ingest", "none", 1024, 1024),
    Field("centre", ("3",), "float32", "source coordinates = points * scale + centre", "ingest", "none", 1024, 1024),
    Field("scale", (), "float32", "radius of the source's bounding ball around centre", "ingest", "none", 1024, 1024),
)

_CACHE = (
    Field(
        "view_features",
        ("v", "d"),
        "float16",
        "the teacher's descriptor of each view",
        "cache",
        "none",
        4096,
        64,
        optional=True,
    ),
    Field(
        "view_tokens",
        ("v", "t", "d"),
        "float16",
        "the teacher's patch features of each view",
        "cache",
        "none",
        4096,
        64,
        optional=True,
    ),
    Field(
        "view_saliency",
        ("v", "t"),
        "float16",
        "the teacher's attention to each patch",
        "cache",
        "none",
        4096,
        64,
        optional=True,
    ),
)

FIELDS: Final[dict[str, Field]] = {field.name: field for field in (*_INGEST, *_CACHE)}
INGEST_FIELDS: Final = tuple(field.name for field in _INGEST)
TEACHER_FIELDS: Final = tuple(field.name for field in _CACHE)

QUARANTINED: Final = 255
"""The split of a row that holds no shape: broken at ingest, or not written yet."""
