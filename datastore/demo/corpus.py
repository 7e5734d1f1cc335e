"""The embedded corpus `demo://shapes`: which shapes it holds, and the mesh of each, made on the spot.

A shape is a function of the corpus' seed, its class and its number in the class, and of nothing else. Asking for more
shapes or for fewer classes therefore leaves every shape as it was.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from datastore.demo.aircraft import aeroplane, rocket
from datastore.demo.dice import Dice, Piece
from datastore.demo.furniture import bed, bookshelf, ladder, table
from datastore.demo.handheld import guitar, hammer, knife, laptop
from datastore.demo.seats import bench, chair, sofa, stool
from datastore.demo.shades import lamp, umbrella
from datastore.demo.solids import Solid
from datastore.demo.vehicles import car, skateboard
from datastore.demo.vessels import bottle, bowl, mug, vase
from datastore.errors import AskedWrongly
from datastore.mesh import Mesh


@dataclass(frozen=True)
class ShapeClass:
    """How shapes of one class are made, and the parts that they may have."""

    make: Callable[[Dice], Iterator[Piece]]
    parts: tuple[str, ...]


_CLASSES: Final[dict[str, ShapeClass]] = {
    "aeroplane": ShapeClass(aeroplane, ("fuselage", "wing", "tail", "engine", "cockpit", "strut", "gear")),
    "bed": ShapeClass(bed, ("frame", "leg", "mattress", "pillow", "headboard", "canopy")),
    "bench": ShapeClass(bench, ("seat", "leg", "back", "arm")),
    "bookshelf": ShapeClass(bookshelf, ("frame", "shelf", "book", "door")),
    "bottle": ShapeClass(bottle, ("body", "cap", "label", "handle")),
    "bowl": ShapeClass(bowl, ("body", "foot", "handle", "content", "lid")),
    "car": ShapeClass(car, ("body", "cabin", "wheel", "window", "lamp", "spoiler", "rack")),
    "chair": ShapeClass(chair, ("seat", "leg", "back", "arm")),
    "guitar": ShapeClass(guitar, ("body", "neck", "head", "string", "bridge", "hole")),
    "hammer": ShapeClass(hammer, ("head", "handle", "claw", "grip")),
    "knife": ShapeClass(knife, ("blade", "handle", "guard")),
    "ladder": ShapeClass(ladder, ("rail", "rung", "brace")),
    "lamp": ShapeClass(lamp, ("shade", "stem", "base")),
    "laptop": ShapeClass(laptop, ("base", "screen", "keyboard", "hinge", "stand")),
    "mug": ShapeClass(mug, ("body", "handle", "drink", "saucer")),
    "rocket": ShapeClass(rocket, ("body", "nose", "fin", "engine", "booster", "window")),
    "skateboard": ShapeClass(skateboard, ("deck", "grip", "truck", "wheel", "brake", "bar")),
    "sofa": ShapeClass(sofa, ("base", "seat", "back", "arm", "leg", "pillow")),
    "stool": ShapeClass(stool, ("seat", "leg", "ring", "back")),
    "table": ShapeClass(table, ("top", "leg", "drawer", "shelf")),
    "umbrella": ShapeClass(umbrella, ("canopy", "shaft", "handle")),
    "vase": ShapeClass(vase, ("body", "foot", "handle", "stem", "flower")),
}

CLASS_NAMES: Final = tuple(_CLASSES)
PART_NAMES: Final = tuple(f"{name}/{part}" for name, kind in _CLASSES.items() for part in kind.parts)
LICENCE: Final = "Apache-2.0"

_PART_INDEX: Final = {name: index for index, name in enumerate(PART_NAMES)}
_STRETCH: Final = 0.15
"""Each axis of a shape is scaled by up to this share, so that proportions alone name no class."""


@dataclass(frozen=True)
class DemoSpec:
    """Which part of the endless corpus is asked for."""

    count: int = 640
    seed: int = 0
    classes: tuple[str, ...] = CLASS_NAMES


def parse_demo_url(url: str) -> DemoSpec:
    """What a URL like `demo://shapes?count=640&seed=0&classes=chair,table` asks for."""
    parts = urlsplit(url)
    if (parts.scheme, parts.netloc, parts.path.strip("/")) != ("demo", "shapes", ""):
        raise AskedWrongly(f"{url}: the demo corpus has one collection. Write demo://shapes?count=640&seed=0")
    given = parse_qsl(parts.query, keep_blank_values=True)
    asked = dict(given)
    if unknown := sorted(asked.keys() - {"count", "seed", "classes"}):
        listed = ", ".join(unknown)
        raise AskedWrongly(f"{url}: unknown option {listed}. The demo corpus takes count, seed and classes.")
    if len(asked) < len(given):
        raise AskedWrongly(f"{url}: an option is given twice. Give count, seed and classes once at most.")
    classes = tuple(asked["classes"].split(",")) if "classes" in asked else CLASS_NAMES
    if unknown := [name for name in classes if name not in _CLASSES]:
        raise AskedWrongly(f"{url}: unknown class {', '.join(map(repr, unknown))}. There are {', '.join(CLASS_NAMES)}.")
    if len(set(classes)) < len(classes):
        raise AskedWrongly(f"{url}: a class is named twice. Name each class once.")
    default = DemoSpec()
    count = _whole_number(url, asked, "count", default.count, at_least=1)
    return DemoSpec(count, _whole_number(url, asked, "seed", default.seed, at_least=0), classes)


def _whole_number(url: str, asked: dict[str, str], name: str, default: int, at_least: int) -> int:
    if name not in asked:
        return default
    if not (asked[name].isascii() and asked[name].isdigit() and int(asked[name]) >= at_least):
        raise AskedWrongly(f"{url}: {name}={asked[name]} is not a whole number from {at_least} up.")
    return int(asked[name])


def demo_shapes(spec: DemoSpec) -> list[tuple[str, int, str]]:
    """Id, class (index into `CLASS_NAMES`) and split of every shape; classes take turns.

    Of each class every fourth shape is for testing, the second one first: a class with two shapes has one of each."""
    shapes = []
    for index in range(spec.count):
        name, ordinal = _which(spec, index)
        shapes.append((f"{name}-{ordinal:05d}", CLASS_NAMES.index(name), "test" if ordinal % 4 == 1 else "train"))
    return shapes


def _which(spec: DemoSpec, index: int) -> tuple[str, int]:
    ordinal, turn = divmod(index, len(spec.classes))
    return spec.classes[turn], ordinal


def demo_mesh(spec: DemoSpec, index: int) -> Mesh:
    """The shape with this index in `demo_shapes`."""
    if not 0 <= index < spec.count:
        raise IndexError(f"shape {index} of a demo corpus that holds {spec.count}")
    name, ordinal = _which(spec, index)
    # a checksum of the name, so that a class added later leaves the shapes of the others as they are
    dice = Dice([spec.seed, zlib.crc32(name.encode()), ordinal])
    stretch = [1 + dice.between(-_STRETCH, _STRETCH) for _ in range(3)]
    yaw = dice.between(0, 360)
    vertices, faces, parts, colours, offset = [], [], [], [], 0
    for piece in _CLASSES[name].make(dice):
        solid = piece.solid
        vertices.append(solid.vertices)
        faces.append(solid.faces + offset)
        parts.append(np.full(len(solid.faces), _PART_INDEX[f"{name}/{piece.part}"], dtype=np.int16))
        colours.append(np.broadcast_to(np.array(piece.colour, dtype=np.uint8), (len(solid.faces), 3)))
        offset += len(solid.vertices)
    whole = Solid(np.concatenate(vertices), np.concatenate(faces)).scaled(*stretch).turned("y", yaw)
    return Mesh(
        vertices=whole.vertices.astype(np.float32),
        faces=whole.faces.astype(np.int32),
        face_parts=np.concatenate(parts),
        face_colours=np.concatenate(colours),
    )
