"""Things to sit on: chair, stool, bench, sofa. They shade into each other, and into tables and beds, on purpose."""

from collections.abc import Iterator

import numpy as np

from datastore.demo.dice import Dice, Piece
from datastore.demo.solids import (
    Points3,
    Solid,
    arc,
    box,
    circle,
    level,
    loft,
    post,
    prism,
    rectangle,
    sideways,
    smooth,
    sweep,
    tube,
    upright,
)
from datastore.demo.supports import Support, support


def chair(dice: Dice) -> Iterator[Piece]:
    """A seat with a back, on any support, sometimes with arms."""
    width, depth = dice.between(0.38, 0.62), dice.between(0.38, 0.58)
    height, thickness, pad = dice.between(0.32, 0.62), dice.between(0.03, 0.06), dice.between(0.03, 0.11)
    frame, cover = dice.colour("wood", "metal", "dark"), dice.colour("wood", "fabric", "fabric", "paint")
    yield Piece("seat", _seat(dice, width, depth, pad).moved(y=height), cover)
    common: tuple[Support, ...] = ("four", "four", "sled", "star")
    style = dice.pick(*common, "four", "splayed", "pedestal", "star", "sled", "panels", "crossed")
    for leg in support(dice, style, width, depth, height, thickness):
        yield Piece("leg", leg, frame)
    rise, recline = dice.between(0.25, 0.75), dice.between(0.0, 0.32)
    colour = dice.pick(cover, frame)
    for back in _chair_back(dice, width, rise, 0.5 * thickness):
        yield Piece("back", back.leaning(z=-recline).moved(y=height + 0.6 * pad, z=-0.46 * depth), colour)
    if dice.chance(0.35):
        for arm in _arms(dice, width, depth, dice.between(0.16, min(0.26, rise)), 0.5 * thickness):
            yield Piece("arm", arm.moved(y=height + 0.5 * pad), frame)


def _seat(dice: Dice, width: float, depth: float, pad: float) -> Solid:
    match dice.pick("board", "cushion", "round", "trapezium"):
        case "board":
            return box(width, pad, depth)
        case "cushion":
            return box(width, 1.3 * pad, depth, bevel=0.48 * pad, steps=3)
        case "round":
            return prism(circle(0.5, 24) * (1.05 * width, 1.05 * depth), pad, bevel=0.3 * pad)
        case _:  # wider in front
            outline = rectangle(width, depth, 0.15 * depth, 3)
            outline[:, 0] *= 1 + 0.35 * outline[:, 1] / depth
            return prism(outline, pad, bevel=0.25 * pad)


def _chair_back(dice: Dice, width: float, rise: float, thickness: float) -> Iterator[Solid]:
    """Backs rise from y = 0 at z = 0 and face the front, +z."""
    half = 0.46 * width
    bow = dice.between(0.0, 0.3) * width  # how far the middle lies behind the ends
    across = np.linspace(-1, 1, 9)
    curve = np.stack([half * across, np.zeros(9), -bow * (1 - across**2)], axis=-1)
    sides = [post((x, -0.02, 0), (x, rise, 0), thickness, sides=8) for x in (-half, half)]
    match dice.pick("panel", "floating", "rungs", "spindles", "hoop", "shell"):
        case "panel":
            yield _bowed_board(curve, 0.0, rise, thickness)
        case "floating":
            gap = dice.between(0.3, 0.6) * rise
            yield _bowed_board(curve, gap, rise, thickness)
            middle = post((0, 0, -bow), (0, 1.1 * gap, -bow), 1.6 * thickness, sides=8)
            yield from dice.pick(sides, [middle])
        case "rungs":
            yield from sides
            count = dice.whole(2, 5)
            for high in np.linspace(rise / count, rise, count).tolist():
                yield _bowed_board(curve, high - 0.45 * rise / count, high, thickness)
        case "spindles":
            yield from sides
            yield _bowed_board(curve, 0.82 * rise, rise, thickness)
            for x, _, z in curve[1 : -1 : dice.pick(1, 2, 2)].tolist():
                yield post((x, 0.0, z), (x, 0.85 * rise, z), 0.5 * thickness, sides=6)
        case "hoop":
            quarter = [(0.9 * half, 0.0), (half, 0.5 * rise), (0.7 * half, 0.9 * rise)]
            hoop = smooth([(-x, y) for x, y in quarter] + [(0.0, rise)] + quarter[::-1], 3)
            yield tube(upright(hoop), thickness, 8)
            for share in np.linspace(-0.6, 0.6, dice.whole(2, 6)).tolist():
                top = 0.97 * rise * (1 - 0.18 * share**2)
                yield post((share * half, 0, 0), (share * half, top, 0), 0.45 * thickness, sides=6)
        case _:  # one padded piece
            shell = box(2 * half, rise, 3.2 * thickness, bevel=1.4 * thickness, steps=3)
            yield shell.tapered(x=dice.between(0.6, 1.05))


def _bowed_board(curve: Points3, low: float, high: float, thickness: float) -> Solid:
    """A board between two heights that follows the curve."""
    section = rectangle(high - low, 1.6 * thickness, 0.4 * thickness)
    return sweep(curve + np.array([0, (low + high) / 2, 0]), section, across=(0, 1, 0))


def _arms(dice: Dice, width: float, depth: float, rise: float, thickness: float) -> Iterator[Solid]:
    """Two arms that start at the back."""
    straight = dice.chance(0.5)
    for x in (-width / 2, width / 2):
        if straight:
            yield box(2.2 * thickness, 1.6 * thickness, 0.85 * depth).moved(x=x, y=rise)
            yield post((x, 0, 0.3 * depth), (x, rise + thickness, 0.3 * depth), thickness, sides=8)
        else:
            bend = [(-0.48 * depth, rise), (0.2 * depth, rise), (0.36 * depth, 0.75 * rise), (0.38 * depth, 0.0)]
            yield tube(sideways(smooth(bend, 4), x), thickness, 8)


def stool(dice: Dice) -> Iterator[Piece]:
    """A small seat on any support, low or high; high ones may have a foot ring and a low rim at the back."""
    width = dice.between(0.26, 0.4)
    depth = width * dice.between(0.75, 1.0)
    height = dice.pick(dice.between(0.34, 0.5), dice.between(0.45, 0.85))
    thickness, pad = dice.between(0.025, 0.055), dice.between(0.025, 0.12)
    frame, cover = dice.colour("wood", "metal", "dark"), dice.colour("wood", "fabric", "paint")
    round_supports: tuple[Support, ...] = ("four", "splayed", "three", "three", "pedestal", "star")
    style = dice.pick(*round_supports, "sled", "panels", "crossed")
    for leg in support(dice, style, width, depth, height, thickness):
        yield Piece("leg", leg, frame)
    if dice.chance(0.3):
        yield Piece("seat", _saddle(width, depth, pad, dice.between(0.1, 0.7)).moved(y=height + 0.5 * pad), cover)
    else:
        yield Piece("seat", _seat(dice, width, depth, pad).moved(y=height), cover)
    if style in round_supports and dice.chance(0.4):
        reach = 0.42 * width * (1.35 if style in ("splayed", "three") else 1.0)
        around = level(arc(reach, 0, 345, 23), height * dice.between(0.2, 0.4))
        yield Piece("ring", tube(around, 0.35 * thickness, 6, joined=True), frame)
    if height > 0.45 and dice.chance(0.3):
        low = height + pad + dice.between(0.05, 0.16)
        rim = level(arc(0.48 * width, 200, 340, 12), low)
        yield Piece("back", sweep(rim, rectangle(dice.between(0.05, 0.12), 0.02, 0.005), across=(0, 1, 0)), cover)
        for x, _, z in rim[[2, -3]].tolist():
            yield Piece("back", post((0.95 * x, height, 0.95 * z), (x, low, z), 0.012, sides=6), frame)


def _saddle(width: float, depth: float, pad: float, bend: float) -> Solid:
    """A seat whose ends bend up."""
    share = np.linspace(-0.5, 0.5, 9)
    curve = np.stack([width * share, bend * 1.1 * width * share**2], axis=-1)
    return sweep(upright(curve), rectangle(depth, 0.7 * pad, 0.2 * pad), across=(0, 0, 1))


def bench(dice: Dice) -> Iterator[Piece]:
    """A seat for two or more, of planks or one board, with or without a back."""
    width, depth = dice.between(0.8, 1.7), dice.between(0.28, 0.5)
    height, thickness, board = dice.between(0.34, 0.52), dice.between(0.04, 0.08), dice.between(0.03, 0.07)
    frame, plank = dice.colour("wood", "metal", "dark", "pale"), dice.colour("wood", "wood", "paint", "pale")
    style: Support = dice.pick("four", "splayed", "sled", "trestle", "panels", "panels", "crossed", "plinth")
    for leg in support(dice, style, width, depth, height, thickness):
        yield Piece("leg", leg, frame)
    planks = dice.whole(1, 5)
    slot = depth / planks
    for z in ((np.arange(planks) + 0.5) * slot - depth / 2).tolist():
        yield Piece("seat", box(width, board, 0.86 * slot).moved(y=height, z=z), plank)
    if dice.chance(0.2):
        cushion = box(0.96 * width, 0.08, 0.92 * depth, bevel=0.035, steps=3)
        yield Piece("seat", cushion.moved(y=height + board), dice.colour("fabric"))
    if dice.chance(0.6):
        rise, recline = dice.between(0.25, 0.5), dice.between(0.05, 0.3)
        rails = dice.whole(1, 4)
        rail = box(width, 0.75 * rise / rails, 0.5 * thickness)
        upright_post = box(0.8 * thickness, rise + 0.04, 0.5 * thickness).moved(z=-0.4 * thickness)
        for low in np.linspace(0.15, 1, rails + 1)[:-1].tolist():
            solid = rail.moved(y=board + low * rise).leaning(z=-recline)
            yield Piece("back", solid.moved(y=height, z=-0.46 * depth), plank)
        for share in (-0.42, 0.42) if width < 1.2 else (-0.42, 0.0, 0.42):
            solid = upright_post.leaning(z=-recline)
            yield Piece("back", solid.moved(share * width, height, -0.46 * depth), frame)
        if dice.chance(0.5):
            for arm in _arms(dice, 0.97 * width, depth, dice.between(0.16, 0.25), 0.4 * thickness):
                yield Piece("arm", arm.moved(y=height), frame)


def sofa(dice: Dice) -> Iterator[Piece]:
    """Padded from the ground up, for one to four, with arms or without, sometimes with a corner."""
    places, place, depth = dice.pick(1, 1, 2, 2, 3, 3, 4), dice.between(0.48, 0.66), dice.between(0.62, 0.92)
    width = places * place
    base, pad, arm_width = dice.between(0.1, 0.26), dice.between(0.08, 0.2), dice.between(0.07, 0.22)
    cover, frame = dice.colour("fabric", "fabric", "dark", "pale"), dice.colour("wood", "metal", "dark")
    second = dice.colour("fabric") if dice.chance(0.3) else cover
    foot = dice.between(0.03, 0.2) if dice.chance(0.85) else 0.0
    top = foot + base
    if foot:
        style: Support = dice.pick("four", "four", "splayed", "sled")
        for leg in support(dice, style, width, depth, foot, dice.between(0.03, 0.07)):
            yield Piece("leg", leg, frame)
    yield Piece("base", box(width, base, depth, bevel=0.03).moved(y=foot), cover)
    middles = ((np.arange(places) - (places - 1) / 2) * place).tolist()
    cushion = box(0.985 * place, pad, 0.78 * depth, bevel=0.35 * pad, steps=3)
    for x in middles:
        yield Piece("seat", cushion.moved(x, top, 0.11 * depth), second)
    rise, thick = dice.between(0.3, 0.7), dice.between(0.12, 0.22)
    cushioned = dice.chance(0.5)
    back = box(0.98 * (place if cushioned else width), rise, thick, bevel=0.35 * thick, steps=3)
    back = back.leaning(z=-dice.between(0.0, 0.25)).moved(y=top, z=-0.5 * depth + 0.55 * thick)
    for x in middles if cushioned else [0.0]:
        yield Piece("back", back.moved(x=x), cover)
    if dice.chance(0.85):
        arm = _sofa_arm(dice, arm_width, base + pad + dice.between(0.02, 0.28), depth)
        for side in (-0.5, 0.5):
            yield Piece("arm", arm.moved(x=side * (width + arm_width), y=foot), cover)
    if places > 1 and dice.chance(0.3):  # a corner, to put up one's feet
        reach = dice.between(0.45, 0.8)
        x, z = dice.pick(-0.5, 0.5) * (width - place), 0.5 * (depth + reach)
        yield Piece("base", box(place, base, reach, bevel=0.03).moved(x, foot, z), cover)
        yield Piece("seat", box(0.985 * place, pad, reach, bevel=0.35 * pad, steps=3).moved(x, top, z), second)
    for _ in range(dice.whole(0, 2)):
        pillow = box(0.34, 0.34, 0.12, bevel=0.055, steps=3).turned("x", -20).turned("y", dice.between(-25, 25))
        x, z = dice.between(-0.42, 0.42) * (width - 0.3), thick + 0.12 - 0.5 * depth
        yield Piece("pillow", pillow.moved(x, top + pad, z), dice.colour("fabric"))


def _sofa_arm(dice: Dice, width: float, height: float, depth: float) -> Solid:
    match dice.pick("block", "padded", "rolled", "sloped"):
        case "block":
            return box(width, height, depth, bevel=0.02)
        case "padded":
            return box(width, height, 0.96 * depth, bevel=0.45 * width, steps=3)
        case "rolled":  # upright below, a scroll along the top
            scroll = arc(0.62 * width, -50, 230, 12) + np.array([0, height - 0.5 * width])
            outline = np.concatenate([[(-0.3 * width, 0), (0.3 * width, 0)], scroll])
            return loft(np.stack([upright(outline, z) for z in (-0.48 * depth, 0.48 * depth)]))
        case _:
            return box(width, height, depth, bevel=0.3 * width, steps=2).tapered(z=dice.between(0.6, 0.85))
