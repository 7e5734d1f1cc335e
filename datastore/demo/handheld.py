"""Things to hold: guitar, laptop, knife, hammer. The long ones lie or stand on end, as ladders do."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from datastore.demo.dice import Dice, Piece
from datastore.demo.solids import (
    Solid,
    box,
    circle,
    cylinder,
    ellipsoid,
    lathe,
    loft,
    post,
    prism,
    rectangle,
    smooth,
    sweep,
    tube,
    upright,
)


def posed(dice: Dice, pieces: Iterable[Piece], standing: float) -> Iterator[Piece]:
    """Pieces drawn upright: left standing with this probability, else laid on their side; a little askew either way."""
    roll = dice.pick(90.0, 270.0) + dice.between(-12, 12)
    tilt = dice.between(-12, 12) + (0 if dice.chance(standing) else 90)
    for piece in pieces:
        yield replace(piece, solid=piece.solid.turned("y", roll).turned("z", tilt))


def knife(dice: Dice) -> Iterator[Piece]:
    """A blade in a handle, standing or lying: kitchen knife, table knife, dagger, cleaver, curved."""
    yield from posed(dice, _upright_knife(dice), standing=0.1)


def _upright_knife(dice: Dice) -> Iterator[Piece]:
    style = dice.pick("kitchen", "kitchen", "table", "dagger", "cleaver", "curved")
    length, handle, girth = dice.between(0.7, 1.4), dice.between(0.4, 0.75), dice.between(0.05, 0.085)
    match style:
        case "cleaver":
            width = dice.between(0.3, 0.5)
        case "dagger":
            width = dice.between(0.1, 0.2)
        case _:
            width = dice.between(0.12, 0.28)
    steel, grip, second = dice.colour("metal"), dice.colour("wood", "dark", "paint"), dice.colour("brass", "metal")
    yield Piece("blade", _blade(dice, style, length, width, dice.between(0.02, 0.045)), steel)

    bow, share = dice.between(-0.1, 0.1) * handle, np.linspace(0, 1, 9)
    path = np.stack([bow * np.sin(np.pi * share), 0.04 - handle * share], axis=-1)
    swell = 1 + dice.pick(0.0, 0.2) * np.sin(3 * np.pi * share) + dice.between(0.0, 0.3) * share
    section = rectangle(1.2 * girth, 2 * girth, 0.45 * girth, 2) if dice.chance(0.6) else circle(girth, 12)
    yield Piece("handle", sweep(upright(path), section, swell, across=(0, 0, 1)), grip)
    if style == "dagger" or dice.chance(0.25):
        yield Piece("guard", box(dice.between(0.24, 0.6), 0.05, 0.12).moved(y=-0.01), second)
    if dice.chance(0.35):  # a pommel
        yield Piece("guard", ellipsoid(1.25 * girth, 0.06, 1.25 * girth, 12).moved(y=0.03 - handle), second)
    if dice.chance(0.4):
        rivet = cylinder(0.018, 2.6 * girth, 10).moved(y=-1.3 * girth).turned("x", 90)
        for x, y in path[dice.pick([2, 6], [2, 4, 6])].tolist():
            yield Piece("handle", rivet.moved(x, y), second)


def _blade(dice: Dice, style: str, length: float, width: float, thickness: float) -> Solid:
    """A blade that grows upwards from y = 0, its thick spine towards -x and its thin edge towards +x."""
    share = np.linspace(0, 1, 13)
    bend = dice.between(0.1, 0.35) * length * share**2 if style == "curved" else np.zeros(13)
    match style:
        case "kitchen":
            spine, edge = np.full(13, -0.35), 0.65 * (1 - share ** dice.between(2.0, 5.0)) - 0.33 * share**4
        case "cleaver":
            spine, edge = np.full(13, -0.4), np.full(13, 0.6)
        case "dagger":
            taper = np.minimum(1, 2.2 * (1 - share)) ** 0.8
            spine, edge = -0.5 * taper, 0.5 * taper
        case "curved":
            spine, edge = -0.45 * (1 - share**3), 0.55 * (1 - share**3)
        case _:
            end = (1 - share**6) ** 0.5
            spine, edge = -0.4 * end, 0.5 * end
    # (share of the width, share of half the thickness) down one side: two edges, or a spine and an edge
    sharp = [(0.0, 0.15), (0.5, 1.0), (1.0, 0.15)] if style == "dagger" else [(0.0, 1.0), (0.6, 0.8), (1.0, 0.08)]
    section = np.array(sharp + [(x, -z) for x, z in sharp[::-1]])
    left, breadth = width * spine - bend, width * np.maximum(edge - spine, 0.03)
    x = left[:, None] + breadth[:, None] * section[:, 0]
    y = np.broadcast_to(length * share[:, None], x.shape)
    z = np.broadcast_to(0.5 * thickness * section[:, 1], x.shape)
    return loft(np.stack([x, y, z], axis=-1))


def hammer(dice: Dice) -> Iterator[Piece]:
    """A head across a handle, standing or lying: claw, ball, sledge, mallet, pick, axe."""
    yield from posed(dice, _upright_hammer(dice), standing=0.3)


def _upright_hammer(dice: Dice) -> Iterator[Piece]:
    style = dice.pick("claw", "claw", "ball", "sledge", "mallet", "pick", "axe")
    length, girth, share = dice.between(0.9, 1.7), dice.between(0.04, 0.07), np.linspace(0, 1, 9)
    path = upright(np.stack([dice.between(-0.05, 0.05) * length * np.sin(2 * np.pi * share), length * share], axis=-1))
    swell = 1 + dice.between(0.0, 0.35) * np.cos(np.pi * share) ** 2 * (share < 0.45)
    section = rectangle(1.6 * girth, 2.1 * girth, 0.6 * girth, 2)
    yield Piece("handle", sweep(path, section, swell, across=(0, 0, 1)), dice.colour("wood", "paint", "dark"))
    if dice.chance(0.4):
        yield Piece("grip", tube(path[: dice.whole(3, 5)], 1.75 * girth, 12), dice.colour("dark", "paint"))
    steel = dice.colour("wood", "dark") if style == "mallet" else dice.colour("metal", "metal", "dark")
    for part, solid in _hammer_head(dice, style, dice.between(0.2, 0.4), dice.between(0.07, 0.14)):
        yield Piece(part, solid.moved(y=length - 0.03), steel)


def _hammer_head(dice: Dice, style: str, reach: float, size: float) -> Iterator[tuple[str, Solid]]:
    """Parts of a head around the origin, its face towards +x."""
    if style in ("claw", "ball", "axe"):
        yield "head", box(2.4 * size, 1.9 * size, 1.7 * size, bevel=0.2 * size).moved(y=-0.95 * size)
    if style in ("claw", "ball"):
        neck, rim = 0.75 * size, 1.05 * size
        face = [(0, 0), (neck, 0), (neck, 0.5 * reach), (rim, 0.65 * reach), (rim, reach), (0, 1.05 * reach)]
        yield "head", lathe(face, 16).turned("z", -90)
    match style:
        case "claw":
            through = [(-0.5 * size, 0.2 * size), (-0.6 * reach, 0.2 * size), (-reach, -0.1 * reach)]
            bend = smooth([*through, (-1.3 * reach, -0.5 * reach)], 4)
            spread = np.linspace(0.35, 0.65, len(bend)) * size  # the two prongs part
            path, thin = np.column_stack([bend, spread]), np.linspace(1, 0.35, len(bend))
            prong = sweep(path, rectangle(0.5 * size, 0.8 * size), thin, across=(0, 0, 1))
            yield from (("claw", prong), ("claw", prong.mirrored("z")))
        case "ball":
            yield "claw", ellipsoid(0.9 * size, 0.9 * size, 0.9 * size, 16).moved(x=-0.8 * reach)
            yield "claw", post((0, 0, 0), (-0.8 * reach, 0, 0), 0.55 * size)
        case "sledge":
            yield "head", prism(circle(1.15 * size, 8), 2 * reach, 0.25 * size).turned("z", 90).moved(x=reach)
        case "mallet":
            barrel = smooth([(1.2 * size, 0), (1.45 * size, reach), (1.2 * size, 2 * reach)], 4)
            turned = lathe([(0, 0), *barrel.tolist(), (0, 2 * reach)], 20).turned("z", 90).moved(x=reach)
            yield "head", dice.pick(turned, box(2 * reach, 2.4 * size, 2.1 * size).moved(y=-1.2 * size))
        case "pick":
            span = reach * dice.between(1.5, 2.2)
            share = np.linspace(-1, 1, 17)
            arch, thick = span * np.stack([share, -0.3 * share**2], axis=-1), 1 - 0.75 * np.abs(share)
            yield "head", sweep(upright(arch), rectangle(1.3 * size, 1.5 * size, 0.2 * size), thick, across=(0, 0, 1))
        case "axe":
            broad = dice.between(1.2, 2.2)
            slices = ((0.5 * size, 0.9, 0.7), (-0.5 * reach, 1.0, 0.45), (-1.1 * reach, broad, 0.15))
            rings = [
                [(x, y, z) for y, z in rectangle(2 * high * size, 2 * thick * size).tolist()]
                for x, high, thick in slices
            ]
            yield "head", loft(np.array(rings))


def guitar(dice: Dice) -> Iterator[Piece]:
    """A body with neck and head, leaning back more or less: acoustic, electric with horns, banjo, ukulele."""
    lean = dice.between(-40, 5)
    for piece in _upright_guitar(dice):
        yield replace(piece, solid=piece.solid.turned("x", lean))


def _upright_guitar(dice: Dice) -> Iterator[Piece]:
    style = dice.pick("acoustic", "acoustic", "electric", "electric", "banjo", "ukulele")
    half, height, neck = dice.between(0.16, 0.23), dice.between(0.42, 0.6), dice.between(0.5, 0.85)
    if style == "ukulele":
        half, neck = 0.8 * half, dice.between(0.32, 0.45)
    thick = dice.between(0.04, 0.07) if style == "electric" else dice.between(0.08, 0.15)
    front = thick / 2
    wood, dark = dice.colour("wood", "wood", "paint"), dice.colour("dark", "wood")
    match style:
        case "banjo":
            height = 2 * half
            rim = 1.06 * half
            profile = [(half, -front), (rim, -0.6 * front), (rim, 0.6 * front), (half, front)]
            drum = lathe([(0, -front), *profile, (0, front)], 28).turned("x", 90).moved(y=half)
            yield Piece("body", drum, dice.colour("pale", "wood"))
        case "electric":
            yield Piece("body", _waisted(dice, half, height, thick), wood)
            for side in dice.pick((-1, 1), (-1, 1), (1,)):
                yield Piece("body", _horn(dice, side * half, height, thick), wood)
            for y in (0.35, 0.55):
                yield Piece("bridge", box(0.6 * half, 0.04, 0.03).moved(y=y * height, z=front), dark)
        case _:
            yield Piece("body", _waisted(dice, half, height, thick), wood)
            hole = cylinder(0.26 * half, 0.008, 20).turned("x", 90).moved(y=0.62 * height, z=front)
            yield Piece("hole", hole, (28, 22, 18))
    yield Piece("bridge", box(0.7 * half, 0.035, 0.025).moved(y=0.24 * height, z=front + 0.004), dark)

    width, start, end = dice.between(0.045, 0.065), 0.7 * height, height + neck
    yield Piece("neck", box(width, end - start, 0.035).tapered(x=0.8).moved(y=start, z=front), wood)
    fingerboard = box(0.95 * width, end - start, 0.012, bevel=0.003).tapered(x=0.8)
    yield Piece("neck", fingerboard.moved(y=start, z=front + 0.02), dark)
    string = post((0, 0.24 * height, front + 0.03), (0, end, front + 0.032), 0.002, sides=4)
    for share in np.linspace(-0.3, 0.3, 4).tolist():
        yield Piece("string", string.moved(x=share * width), (214, 206, 180))

    crown, spread = dice.between(0.12, 0.2), dice.between(1.2, 2.0)
    head = box(1.1 * width, crown, 0.03).tapered(x=spread).turned("x", -dice.between(0, 14))
    yield Piece("head", head.moved(y=end - 0.01, z=front), wood)
    peg, metal = cylinder(0.009, 0.035, 6).turned("z", -90), dice.colour("metal")
    for share in np.linspace(0.25, 0.85, dice.pick(2, 3)).tolist():
        solid = peg.moved(0.55 * width * (1 + (spread - 1) * share), end + share * crown, front)
        yield from (Piece("head", solid, metal), Piece("head", solid.mirrored("x"), metal))


def _waisted(dice: Dice, half: float, height: float, thickness: float) -> Solid:
    """The body of a guitar: wide hips, a waist, shoulders."""
    waist, shoulder = dice.between(0.55, 0.8), dice.between(0.65, 0.95)
    hips = [(0.5, 0.0), (0.95, 0.1), (1.0, 0.28)]
    breadth, y = smooth([*hips, (waist, 0.6), (shoulder, 0.84), (0.7 * shoulder, 0.96), (0.35, 1.0)], 4).T
    section = rectangle(2.0, thickness, 0.12 * thickness, 2)
    x = half * breadth[:, None] * section[:, 0]
    y, z = np.broadcast_to(height * y[:, None], x.shape), np.broadcast_to(section[:, 1], x.shape)
    return loft(np.stack([x, y, z], axis=-1))


def _horn(dice: Dice, half: float, height: float, thickness: float) -> Solid:
    tip = (half * dice.between(0.6, 0.95), height * dice.between(1.08, 1.25))
    path = smooth([(0.55 * half, 0.72 * height), (0.8 * half, 0.95 * height), tip], 4)
    section = rectangle(0.95 * thickness, 0.32 * abs(half))
    return sweep(upright(path), section, np.linspace(1.0, 0.45, len(path)), across=(0, 0, 1))


def laptop(dice: Dice) -> Iterator[Piece]:
    """Two slabs at a hinge, from nearly shut to flat open, some on a stand."""
    width, depth = dice.between(0.7, 1.15), dice.between(0.5, 0.78)
    slab, lid, height = dice.between(0.025, 0.08), dice.between(0.02, 0.04), depth * dice.between(0.92, 1.1)
    shell, dark = dice.colour("metal", "dark", "pale", "paint"), dice.colour("dark")
    raised = dice.between(0.12, 0.3) if dice.chance(0.1) else 0.0
    top = raised + slab
    yield Piece("base", box(width, slab, depth, bevel=0.3 * slab, steps=2).moved(y=raised, z=depth / 2), shell)
    rows, columns = dice.whole(3, 4), dice.whole(6, 9)
    pitch_x, pitch_z = 0.86 * width / columns, 0.48 * depth / rows
    key = box(0.86 * pitch_x, 0.012, 0.84 * pitch_z, bevel=0.0).moved(y=top - 0.004)
    for row in range(rows):
        for column in range(columns):
            x, z = (column - (columns - 1) / 2) * pitch_x, 0.1 * depth + (row + 0.5) * pitch_z
            yield Piece("keyboard", key.moved(x=x, z=z), dark)
    touchpad = box(0.3 * width, 0.006, 0.24 * depth, bevel=0.001)
    yield Piece("keyboard", touchpad.moved(y=top - 0.002, z=0.8 * depth), dice.colour("metal"))
    bar = cylinder(0.6 * slab, 0.8 * width, 10).turned("z", 90).moved(x=0.4 * width, y=top - 0.2 * slab)
    yield Piece("hinge", bar, dark)

    opening = dice.between(*dice.pick((85, 130), (85, 130), (85, 130), (55, 85), (130, 165)))
    case = box(width, height, lid, bevel=0.3 * lid, steps=2).moved(z=-lid / 2)
    picture = box(0.92 * width, 0.86 * height, 0.006, bevel=0.001).moved(y=0.07 * height, z=0.002)
    for solid, colour in ((case, shell), (picture, dice.colour("paint", "glass", "dark"))):
        # drawn upright; 180 degrees of opening lie flat behind the hinge
        yield Piece("screen", solid.turned("x", 90 - opening).moved(y=top - 0.2 * slab), colour)
    if raised:
        leg, colour = box(0.05, raised, 0.8 * depth).moved(z=depth / 2), dice.colour("metal", "wood")
        for x in (-0.4 * width, 0.4 * width):
            yield Piece("stand", leg.moved(x=x), colour)
