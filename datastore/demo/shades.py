"""Things with something wide on a thin stem: lamp, umbrella. Parasols and lamps stand on the same feet."""

from collections.abc import Iterator

import numpy as np

from datastore.demo.dice import Dice, Piece
from datastore.demo.solids import Solid, arc, box, ellipsoid, lathe, loft, post, smooth, tube, upright


def lamp(dice: Dice) -> Iterator[Piece]:
    """A shade on a stem: table lamp, floor lamp, arched or jointed."""
    style = dice.pick("straight", "straight", "straight", "turned", "turned", "arched", "jointed")
    height = dice.between(0.35, 0.75) if style in ("turned", "jointed") else dice.between(0.45, 1.6)
    body, light = (
        dice.colour("metal", "dark", "brass", "wood", "ceramic"),
        dice.colour("pale", "pale", "fabric", "glass"),
    )
    stem = dice.between(0.008, 0.02) * (1 + 0.6 * height)
    size = dice.between(0.12, 0.26) * (0.6 + 0.4 * height)
    yield Piece("base", _foot(dice, dice.between(0.09, 0.2), stem), body)
    match style:
        case "straight":
            yield Piece("stem", post((0, 0.01, 0), (0, height, 0), stem), body)
            yield Piece("shade", _shade(dice, size).moved(y=height), light)
        case "turned":
            yield Piece("stem", _turned_stem(dice, height, stem), body)
            yield Piece("shade", _shade(dice, size).moved(y=height), light)
        case "arched":
            reach, drop = dice.between(0.35, 0.8) * height, dice.between(0.75, 0.95) * height
            bow = [(0, 0.01), (0, 0.6 * height), (0.25 * reach, 0.93 * height), (0.7 * reach, height), (reach, drop)]
            yield Piece("stem", tube(upright(smooth(bow, 5)), stem, 8), body)
            size = min(size, 0.6 * reach)
            yield Piece("shade", _shade(dice, size).moved(x=reach, y=drop - 0.4 * size), light)
        case "jointed":
            elbow = (-dice.between(0.1, 0.5) * height, 0.55 * height, 0.0)
            head = (dice.between(0.2, 0.6) * height, dice.between(0.8, 1.1) * height, 0.0)
            yield Piece("stem", post((0, 0.02, 0), elbow, stem, sides=8), body)
            yield Piece("stem", post(elbow, head, stem, sides=8), body)
            yield Piece("stem", ellipsoid(2 * stem, 2 * stem, 2 * stem, 10).moved(*elbow), body)
            outside = [(0.0, 0.05), (0.035, 0.05), (0.045, 0.0), (0.1, -0.14)]
            cone = lathe([*outside, (0.092, -0.14), (0.04, -0.01), (0, -0.01)], 18)
            yield Piece("shade", cone.turned("z", dice.between(-10, 60)).moved(*head), light)


def _turned_stem(dice: Dice, height: float, stem: float) -> Solid:
    waist, belly, share = dice.between(0.02, 0.05), dice.between(0.05, 0.13), dice.between(0.25, 0.6)
    through = [(0.09, 0.02), (waist, 0.12 * height), (belly, share * height), (waist, 0.8 * height), (stem, height)]
    return lathe([(0, 0.02), *smooth(through, 5).tolist(), (0, height)], 18)


def _foot(dice: Dice, reach: float, stem: float) -> Solid:
    match dice.pick("disc", "dome", "block"):
        case "disc":
            return lathe([(0, 0), (reach, 0), (reach, 0.015), (0.9 * reach, 0.025), (0, 0.025)], 24)
        case "dome":
            flank = smooth([(reach, 0), (0.8 * reach, 0.035), (0.35 * reach, 0.06), (1.5 * stem, 0.09)], 3)
            return lathe([(0, 0), *flank.tolist(), (0, 0.09)], 24)
        case _:
            return box(1.7 * reach, 0.03 + 0.2 * reach, 1.7 * reach)


def _shade(dice: Dice, size: float) -> Solid:
    """A shade around y = 0, open above and below unless it is a globe."""
    wall, rise = 0.03 * size, dice.between(0.35, 0.6) * size
    match dice.pick("cone", "cone", "drum", "square", "dome", "globe"):
        case "globe":
            return ellipsoid(0.6 * size, 0.6 * size * dice.between(0.8, 1.2), 0.6 * size, 18).moved(y=0.4 * size)
        case "dome":
            shares = [(1.0, -0.3), (0.85, 0.15), (0.4, 0.5), (0.08, 0.6)]
            outside = size * smooth(shares, 4)
            return lathe(np.concatenate([outside, outside[::-1] - wall]), 24, joined=True)
        case kind:
            top = size * (dice.between(0.9, 1.0) if kind == "drum" else dice.between(0.35, 0.8))
            profile = [(size, -rise), (top, rise), (top - wall, rise), (size - wall, -rise)]
            return lathe(profile, 4 if kind == "square" else 24, joined=True)


def umbrella(dice: Dice) -> Iterator[Piece]:
    """A canopy on a shaft: open, half open or rolled up, with a crook or a knob, or a parasol on a foot."""
    style = dice.pick("open", "open", "parasol", "parasol", "half", "closed")
    cloth, metal = dice.colour("paint", "fabric"), dice.colour("metal", "dark", "wood")
    height, shaft, ribs = dice.between(0.75, 1.0), dice.between(0.008, 0.014), dice.whole(6, 12)
    match style:
        case "open":
            spread, fall, bulge = dice.between(0.4, 0.75), dice.between(0.14, 0.34), dice.between(0.05, 0.3)
        case "parasol":
            height *= 1.25
            spread, fall, bulge = dice.between(0.4, 0.8), dice.between(0.08, 0.34), dice.between(0.0, 0.3)
        case "half":
            spread, fall, bulge = dice.between(0.18, 0.3), dice.between(0.4, 0.55), dice.between(0.0, 0.3)
        case _:
            spread, fall, bulge = dice.between(0.04, 0.09), dice.between(0.55, 0.7), dice.between(-0.1, 0.1)
    yield Piece("canopy", _canopy(spread, fall, bulge, ribs).moved(y=height), cloth)
    thick = 1.6 * shaft if style == "parasol" else shaft
    yield Piece("shaft", post((0, 0.05, 0), (0, height + 0.06, 0), thick, sides=8), metal)
    if style in ("open", "half") and dice.chance(0.8):  # the stretchers that hold it open
        low, high, reach = height - 0.9 * fall - 0.05, height - 0.5 * fall, 0.55 * spread
        for x, z in arc(reach, 0, 360, ribs)[:-1].tolist():
            yield Piece("shaft", post((0, low, 0), (x, high, z), 0.004, sides=4), metal)
    yield from _umbrella_handle(dice, style, shaft)


def _umbrella_handle(dice: Dice, style: str, shaft: float) -> Iterator[Piece]:
    grip = dice.colour("wood", "dark")
    if style == "parasol":
        foot = _foot(dice, dice.between(0.12, 0.26), shaft).scaled(y=1.6)
        yield Piece("handle", foot, dice.colour("dark", "metal", "pale"))
    elif dice.chance(0.6):
        bend = dice.between(0.045, 0.075)
        crook = arc(bend, 180, 360, 10) * (1, 1.25) + (bend, 0.02)
        yield Piece("handle", tube(upright(np.concatenate([[(0, 0.16), (0, 0.09)], crook])), 1.5 * shaft, 10), grip)
    else:
        knob = [(0.02, -0.04), (0.026, 0.02), (0.018, 0.06), (0.022, 0.12)]
        yield Piece("handle", lathe([(0, -0.04), *knob, (0, 0.12)], 12), grip)


def _canopy(spread: float, fall: float, bulge: float, ribs: int) -> Solid:
    """A cloth that hangs from its tip at y = 0, cut in between its ribs, and as thick as a solid has to be."""
    share = np.linspace(0.06, 1.0, 9)[:, None]
    angles = np.arange(4 * ribs) * (2 * np.pi / (4 * ribs))
    slack = 0.5 - 0.5 * np.cos(ribs * angles)  # 0 on a rib, 1 half way to the next
    radius = spread * share * (1 - 0.07 * slack * share)
    drop = fall * (share ** (1 + 2 * bulge) - 0.12 * slack * share**3)
    outer = np.stack([radius * np.cos(angles), -drop, radius * np.sin(angles)], axis=-1)
    thickness = 0.012
    inner = outer[::-1] * (0.985, 1.0, 0.985) - (0, thickness, 0)
    return loft(np.concatenate([outer, inner]), start=(0.0, 0.0, 0.0), end=(0.0, -thickness, 0.0))
