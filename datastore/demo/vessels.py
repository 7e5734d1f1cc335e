"""Things that hold something: mug, vase, bottle, bowl. All of them are turned, and their proportions overlap."""

from collections.abc import Iterator, Sequence

import numpy as np

from datastore.demo.dice import Dice, Piece
from datastore.demo.solids import (
    Points2,
    Solid,
    box,
    cylinder,
    ellipsoid,
    lathe,
    rectangle,
    smooth,
    sweep,
    tube,
    upright,
)


def hollow(outline: Points2, wall: float, floor: float, sides: int = 28) -> Solid:
    """An open vessel: its outline (radius, height) from foot to rim, a lip, and the way down inside to the floor."""
    inside = outline[outline[:, 1] > floor] - (wall, 0)
    inside[:, 0] = np.maximum(inside[:, 0], 0.15 * wall)
    lip = (outline[-1:] + inside[-1:]) / 2 + (0, 0.35 * wall)
    bottom, middle = [(0.0, outline[0, 1])], [(0.0, floor)]
    return lathe(np.concatenate([bottom, outline, lip, inside[::-1], middle]), sides)


def radius_at(outline: Points2, height: float) -> float:
    """The radius of an outline at this height."""
    return float(np.interp(height, outline[:, 1], outline[:, 0]))


def ear(outline: Points2, low: float, high: float, reach: float, thickness: float, kind: str) -> Solid:
    """A handle towards +x from one height of an outline to another, standing out by `reach`. Its ends lie inside."""
    foot, head = radius_at(outline, low) - 0.8 * thickness, radius_at(outline, high) - 0.8 * thickness
    outer, rise = max(foot, head) + reach, high - low
    match kind:
        case "angular":
            path = np.array([(foot, low), (outer, low + 0.02 * rise), (outer, high - 0.02 * rise), (head, high)])
        case "sagging":
            through = [(foot, low), (0.9 * outer, low + 0.05 * rise), (outer, low + 0.4 * rise), (head, high)]
            path = smooth(through, 6)
        case _:
            below, above = (
                (0.45 * foot + 0.55 * outer, low + 0.04 * rise),
                (0.45 * head + 0.55 * outer, high - 0.04 * rise),
            )
            path = smooth([(foot, low), below, (outer, low + 0.5 * rise), above, (head, high)], 5)
    section = rectangle(2.4 * thickness, 1.4 * thickness, 0.6 * thickness, 2)
    return sweep(upright(path), section, across=(0, 0, 1))


def mug(dice: Dice) -> Iterator[Piece]:
    """A cup with one ear or two: straight, tapered, bellied or footed, full or empty, some on a saucer."""
    height, radius, wall = dice.between(0.7, 1.3), dice.between(0.36, 0.6), dice.between(0.035, 0.06)
    foot, middle = radius * dice.between(0.6, 1.1), radius * dice.between(0.85, 1.2)
    glaze = dice.colour("ceramic", "paint", "pale", "metal")
    second = glaze if dice.chance(0.6) else dice.colour("ceramic", "paint", "dark")
    if dice.chance(0.4):
        outline = np.array([(0.94 * foot, 0.0), (foot, 0.04), *np.linspace((foot, 0.08), (radius, height), 6)])
    else:
        outline = smooth([(0.8 * foot, 0.0), (foot, 0.06), (middle, 0.5 * height), (radius, height)], 5)
    yield Piece("body", hollow(outline, wall, 0.09), glaze)
    low, high = dice.between(0.14, 0.3) * height, dice.between(0.72, 0.92) * height
    kind = dice.pick("round", "round", "angular", "sagging")
    handle = ear(outline, low, high, dice.between(0.18, 0.38), dice.between(0.035, 0.06), kind)
    for turn in dice.pick(*[(0.0,)] * 7, (0.0, 180.0)):
        yield Piece("handle", handle.turned("y", turn), second)
    if dice.chance(0.4):
        full = dice.between(0.55, 0.9) * height
        drink = cylinder(radius_at(outline, full) - 0.7 * wall, 0.02, 28)
        yield Piece("drink", drink.moved(y=full), (74, 44, 28))
    if dice.chance(0.15):
        rim = radius * dice.between(1.4, 1.9)
        plate = [(0, -0.02), (0.5 * rim, -0.02), (rim, 0.09), (rim, 0.13), (0.55 * rim, 0.02), (0, 0.02)]
        yield Piece("saucer", lathe(plate, 28), second)


def vase(dice: Dice) -> Iterator[Piece]:
    """A turned body of any profile, open at the top, with or without a foot, handles and flowers."""
    height, foot, belly = dice.between(1.1, 2.0), dice.between(0.2, 0.4), dice.between(0.32, 0.6)
    neck, rim, share = dice.between(0.13, 0.36), dice.between(0.17, 0.5), dice.between(0.25, 0.6)
    match dice.pick("shouldered", "shouldered", "flared", "gourd", "straight"):
        case "shouldered":
            middle = 0.5 * (foot + belly)
            through = [(foot, 0), (middle, 0.4 * share), (belly, share), (neck, dice.between(0.7, 0.88)), (rim, 1)]
        case "flared":
            through = [(foot, 0), (0.7 * foot, 0.2), (0.8 * foot, 0.45), (0.6 * belly, 0.75), (belly, 1)]
        case "gourd":
            through = [(foot, 0), (belly, 0.25), (neck, 0.52), (0.7 * belly, 0.74), (neck, 0.93), (1.2 * neck, 1)]
        case _:
            through = [(foot, 0), (foot * dice.between(0.9, 1.3), 0.3), (0.7 * belly, 0.75), (0.7 * belly, 1)]
    outline = smooth(np.array(through) * (1, height), 5)
    outline[:, 0] = np.maximum(outline[:, 0], 0.1)
    glaze = dice.colour("ceramic", "ceramic", "paint", "glass", "brass")
    yield Piece("body", hollow(outline, 0.04, 0.06, dice.pick(28, 28, 28, 6)), glaze)
    if dice.chance(0.3):
        ring = foot + dice.between(0.02, 0.05)
        stand = lathe([(0, -0.1), (ring, -0.1), (ring, -0.04), (0.85 * foot, 0.02), (0, 0.02)], 24)
        yield Piece("foot", stand, dice.colour("ceramic", "brass", "dark"))
    if dice.chance(0.2):
        low, high = (0.9 * share + 0.1) * height, dice.between(0.82, 0.95) * height
        handle = ear(outline, low, high, dice.between(0.1, 0.28), 0.035, dice.pick("round", "angular", "sagging"))
        for turn in dice.pick(*[(0.0, 180.0)] * 5, (0.0,)):
            yield Piece("handle", handle.turned("y", turn), glaze)
    if dice.chance(0.35):
        yield from _flowers(dice, height, 0.6 * float(outline[-1, 0]))


def _flowers(dice: Dice, height: float, opening: float) -> Iterator[Piece]:
    stalk, petal = dice.colour("leaf"), dice.colour("paint")
    count, start = dice.whole(2, 6), dice.between(0, 90)
    for turn in (start + np.arange(count) * (360 / count)).tolist():
        reach, rise, size = dice.between(0.1, 0.5), dice.between(0.25, 0.8), dice.between(0.06, 0.13)
        path = smooth([(0, 0.3 * height), (0.6 * opening, height), (reach, height + rise)], 4)
        yield Piece("stem", tube(upright(path), 0.018, 6).turned("y", turn), stalk)
        bloom = ellipsoid(size, 0.8 * size, size, 10).moved(reach, height + rise)
        yield Piece("flower", bloom.turned("y", turn), petal)


def bottle(dice: Dice) -> Iterator[Piece]:
    """A body that narrows to a neck with a cap: wine bottle, flask, jar, jug, square bottle, pump."""
    style = dice.pick("shouldered", "shouldered", "sloping", "flask", "jar", "square")
    height, radius = dice.between(1.1, 2.0), dice.between(0.24, 0.48)
    neck, shoulder, collar = radius * dice.between(0.25, 0.5), dice.between(0.45, 0.68), dice.between(0.7, 0.85)
    if style == "jar":
        height, neck, shoulder, collar = dice.between(0.7, 1.2), radius * dice.between(0.6, 0.85), 0.72, 0.86
    low, high = shoulder * height, collar * height
    match style:
        case "flask":
            through = [(0.6 * radius, 0), (1.25 * radius, 0.25 * height), (0.8 * radius, 0.5 * height)]
            outline = smooth([*through, (neck, high), (neck, height)], 5)
        case "sloping":
            through = [(radius, 0.02 * height), (radius, 0.35 * height), (1.6 * neck, high), (neck, height)]
            outline = smooth(through, 5)
        case _:
            bend = smooth([(radius, low), (0.85 * radius, 0.75 * low + 0.25 * high), (neck, high)], 5)
            outline = np.array([(radius, 0.03 * height), (radius, 0.5 * low), *bend, (neck, height)])
    outline[:, 0] = np.maximum(outline[:, 0], 0.9 * neck)
    profile = [(0, 0), (0.9 * outline[0, 0], 0), *outline.tolist(), (0, height)]
    body = lathe(profile, 4).scaled(1.2, 1.0, 1.2) if style == "square" else lathe(profile)
    glass = dice.colour("glass", "glass", "paint", "pale", "dark")
    flat = dice.between(0.6, 1.0) if style in ("square", "flask") else 1.0
    yield Piece("body", body.scaled(z=flat), glass)
    shine = dice.colour("metal", "dark", "paint", "wood")
    for cap in _cap(dice, neck, dice.between(0.06, 0.18) * height):
        yield Piece("cap", cap.moved(y=height), shine)
    if style in ("shouldered", "jar") and dice.chance(0.6):
        edge, bottom, top = 1.015 * radius, 0.2 * low, 0.85 * low
        band = [(0.9 * radius, bottom), (edge, bottom), (edge, top), (0.9 * radius, top)]
        yield Piece("label", lathe(band, joined=True), dice.colour("pale", "paint"))
    if style in ("shouldered", "sloping") and dice.chance(0.2):
        reach, kind = dice.between(0.05, 0.2), dice.pick("round", "sagging")
        yield Piece("handle", ear(outline, 0.45 * height, 0.92 * height, reach, 0.04, kind), glass)


def _cap(dice: Dice, neck: float, rise: float) -> Iterator[Solid]:
    """What closes a neck that ends at y = 0."""
    match dice.pick("screw", "screw", "cork", "pump", "ring"):
        case "screw":
            yield lathe(
                [(0, 0), (1.15 * neck, 0), (1.15 * neck, rise), (1.05 * neck, 1.1 * rise), (0, 1.1 * rise)]
            ).moved(y=-0.5 * rise)
        case "cork":
            yield cylinder(0.8 * neck, rise).tapered(1.2, 1.2).moved(y=-0.3 * rise)
        case "pump":
            yield cylinder(1.15 * neck, rise).moved(y=-0.5 * rise)
            yield cylinder(0.3 * neck, 1.5 * rise).moved(y=0.4 * rise)
            yield box(2.6 * neck, 0.5 * rise, 0.8 * neck).moved(x=0.9 * neck, y=1.6 * rise)
        case _:
            yield cylinder(1.2 * neck, 0.4 * rise).moved(y=-0.6 * rise)


def bowl(dice: Dice) -> Iterator[Piece]:
    """An open round vessel, from a plate to a pot: on a foot or not, empty, filled or lidded, some with grips."""
    radius, height, wall = dice.between(0.6, 1.1), dice.between(0.25, 0.95), dice.between(0.03, 0.06)
    foot, belly = radius * dice.between(0.3, 0.7), radius * dice.between(0.75, 1.12)
    glaze = dice.colour("ceramic", "ceramic", "wood", "metal", "glass")
    outline = smooth([(foot, 0), (0.82 * belly, 0.3 * height), (0.97 * belly, 0.65 * height), (radius, height)], 5)
    yield Piece("body", hollow(outline, wall, 0.06, dice.pick(30, 30, 30, 8)), glaze)
    if dice.chance(0.5):
        drop = dice.pick(0.06, 0.1, dice.between(0.2, 0.5))
        ring, stem = foot * dice.between(0.7, 1.2), foot * dice.between(0.35, 0.95)
        profile = [(0, -drop), (ring, -drop), (ring, -0.8 * drop), (stem, -0.5 * drop), (stem, 0.03), (0, 0.03)]
        yield Piece("foot", lathe(profile), glaze)
    if dice.chance(0.22):
        kind = dice.pick("round", "angular")
        grip = ear(outline, 0.5 * height, 0.85 * height, dice.between(0.12, 0.24), 0.04, kind)
        for turn in dice.pick(*[(0.0, 180.0)] * 5, (0.0,)):
            yield Piece("handle", grip.turned("y", turn), glaze)
    match dice.pick("empty", "empty", "fruit", "soup", "lid"):
        case "fruit":
            count = dice.whole(3, 6)
            for turn in (np.arange(count) * (360 / count)).tolist():
                size = radius * dice.between(0.18, 0.3)
                fruit = ellipsoid(size, size, size, 12).moved(0.5 * radius, 0.75 * height).turned("y", turn)
                yield Piece("content", fruit, dice.colour("paint"))
        case "soup":
            full = dice.between(0.5, 0.9) * height
            soup = cylinder(radius_at(outline, full) - 0.6 * wall, 0.02, 30).moved(y=full)
            yield Piece("content", soup, dice.colour("paint", "wood"))
        case "lid":
            for solid in _lid(radius, dice.between(0.08, 0.4)):
                yield Piece("lid", solid.moved(y=height), glaze)


def _lid(radius: float, rise: float) -> Sequence[Solid]:
    dome = smooth([(radius, 0.03), (0.6 * radius, 0.7 * rise), (0.08, rise)], 4)
    knob = ellipsoid(0.1, 0.08, 0.1, 12).moved(y=rise + 0.05)
    return lathe([(0, 0), (radius, 0), *dome.tolist(), (0, rise)], 28), knob
