"""Things on wheels: car, skateboard."""

from collections.abc import Iterator, Sequence

import numpy as np

from datastore.demo.dice import Colour, Dice, Piece
from datastore.demo.solids import Points2, Solid, box, cylinder, ellipsoid, lathe, loft, post, rectangle, sweep, upright

Skyline = Sequence[tuple[float, float]]

# side views from front to back: place in shares of half the length, height in shares of the body's or cabin's height
_BONNET: Skyline = ((1.0, 0.5), (0.95, 0.65), (0.4, 0.8), (0.3, 1.0), (-0.85, 1.0), (-0.98, 0.85), (-1.0, 0.5))
_BLUNT: Skyline = ((1.0, 0.5), (0.99, 0.9), (0.85, 1.0), (-0.95, 1.0), (-0.99, 0.9), (-1.0, 0.5))
_WEDGE: Skyline = ((1.0, 0.3), (0.9, 0.45), (0.4, 0.75), (0.0, 0.9), (-0.8, 0.9), (-1.0, 0.6))
_STYLES: dict[str, tuple[Skyline, Skyline]] = {
    "saloon": (_BONNET, ((0.42, 0.0), (0.12, 1.0), (-0.35, 1.0), (-0.68, 0.0))),
    "estate": (_BONNET, ((0.42, 0.0), (0.15, 1.0), (-0.8, 1.0), (-0.96, 0.0))),
    "pickup": (_BONNET, ((0.45, 0.0), (0.2, 1.0), (-0.1, 1.0), (-0.18, 0.0))),
    "beetle": (_BONNET, ((0.5, 0.0), (0.25, 0.95), (-0.15, 1.15), (-0.5, 0.8), (-0.85, 0.0))),
    "van": (_BLUNT, ((0.85, 0.0), (0.5, 1.5), (-0.92, 1.55), (-0.98, 0.0))),
    "bus": (_BLUNT, ((0.97, 0.0), (0.9, 1.7), (-0.95, 1.7), (-0.98, 0.0))),
    "racer": (_WEDGE, ((0.05, 0.0), (-0.1, 0.5), (-0.4, 0.55), (-0.75, 0.0))),
}


def car(dice: Dice) -> Iterator[Piece]:
    """A body on wheels, front at +x: saloon, estate, pick-up, beetle, van, bus, racer."""
    style = dice.pick(*_STYLES)
    half, width, wheel = dice.between(0.75, 1.1), dice.between(0.62, 0.85), dice.between(0.14, 0.23)
    lower, cabin, clear = dice.between(0.22, 0.36), dice.between(0.24, 0.36), 0.6 * wheel
    waist, slim = clear + lower, width * dice.between(0.78, 0.92)
    paint, glass = dice.colour("paint", "pale", "metal", "dark"), (52, 66, 82)
    sides, roof = (np.array(skyline) for skyline in _STYLES[style])
    sides, roof = sides * (half, lower) + (0, clear), roof * (half, cabin) + (0, waist)
    yield Piece("body", _hull(sides, clear, width, 0.06), paint)
    yield Piece("cabin", _hull(roof, waist - 0.06, slim, 0.1), paint if style in ("van", "bus") else glass)
    height = float(roof[:, 1].max())
    match style:
        case "van" | "bus":
            panes = (0.45,) if style == "van" else tuple(np.linspace(-0.75, 0.7, dice.whole(3, 6)).tolist())
            pane = box(half * (0.3 if style == "van" else 1.1 / len(panes)), 0.6 * cabin, 0.03, bevel=0.005)
            for x in panes:
                for z in (-0.49 * slim, 0.49 * slim):
                    yield Piece("window", pane.moved(x * half, waist + 0.35 * cabin, z), glass)
        case "racer":
            yield from _spoiler(half, waist, width, paint)
        case _:
            plate = roof[roof[:, 1] > waist + 0.5 * cabin] * (0.97, 1.0) + (0, 0.012)
            yield Piece("body", _hull(plate, float(plate[:, 1].min()) - 0.035, 0.9 * slim, 0.03), paint)
    if style == "pickup":
        for z in (-0.46 * width, 0.46 * width):
            yield Piece("body", box(0.8 * half, 0.5 * cabin, 0.05).moved(-0.58 * half, waist - 0.02, z), paint)
        yield Piece("body", box(0.05, 0.5 * cabin, 0.9 * width).moved(-0.97 * half, waist - 0.02), paint)
    elif style in ("saloon", "estate", "van") and dice.chance(0.25):
        yield from _rack(half, height, width)
    elif style == "saloon" and dice.chance(0.3):
        yield from _spoiler(half, waist, width, paint)

    tyre, track = _tyre(wheel), 0.5 * width + (0.1 if style == "racer" else -0.02)
    lamp = ellipsoid(0.03, 0.045, 0.06, 10).moved(0.985 * half, clear + lower * (0.3 if style == "racer" else 0.5))
    for x in (half * dice.between(0.55, 0.68), -half * dice.between(0.55, 0.68)):
        for z in (-track, track):
            yield Piece("wheel", tyre.moved(x, wheel, z), (36, 36, 38))
    for z in (-0.34 * width, 0.34 * width):
        yield Piece("lamp", lamp.moved(z=z), (240, 232, 190))


def _hull(skyline: Points2, low: float, width: float, draw_in: float) -> Solid:
    """A body with this side view, standing on the level `low`, whose upper edges draw in towards the middle."""
    rings = []
    for x, top in skyline.tolist():
        rise = max(top - low, 0.02)
        side = width / 2
        shoulder = side - draw_in * min(1.0, 2 * rise)
        flank = [(0.97 * side, 0.0), (side, 0.3), (side, 0.6), (shoulder, 0.95), (0.85 * shoulder, 1.0)]
        section = flank + [(-z, y) for z, y in flank[::-1]]
        rings.append([(x, low + y * rise, z) for z, y in section])
    return loft(np.array(rings))


def _tyre(radius: float) -> Solid:
    half = [(0.55 * radius, 0.06), (0.6 * radius, 0.075), (0.95 * radius, 0.075), (radius, 0.05)]
    return lathe([(0, -0.06), *((r, -y) for r, y in half), *half[::-1], (0, 0.06)], 20).turned("x", 90)


def _spoiler(half: float, waist: float, width: float, colour: Colour) -> Iterator[Piece]:
    yield Piece("spoiler", box(0.16, 0.03, 0.95 * width).moved(-0.9 * half, waist + 0.22), colour)
    for z in (-0.3 * width, 0.3 * width):
        yield Piece("spoiler", box(0.08, 0.28, 0.03).moved(-0.9 * half, waist - 0.06, z), colour)


def _rack(half: float, height: float, width: float) -> Iterator[Piece]:
    front, back, side = 0.1 * half, -0.6 * half, 0.3 * width
    for z in (-side, side):
        yield Piece("rack", post((front, height + 0.04, z), (back, height + 0.04, z), 0.018, sides=6), (60, 60, 64))
    for x in (-0.1 * half, -0.5 * half):
        yield Piece("rack", post((x, height + 0.03, -side), (x, height + 0.03, side), 0.018, sides=6), (60, 60, 64))


def skateboard(dice: Dice) -> Iterator[Piece]:
    """A deck on two pairs of wheels: kicked or flat, round or pointed, waisted; some with a brake or a bar to hold."""
    half, width, clear = dice.between(0.6, 1.0), dice.between(0.32, 0.55), dice.between(0.14, 0.26)
    kick_front, kick_back, thickness = dice.between(0.0, 0.4), dice.between(0.0, 0.4), dice.between(0.03, 0.07)
    board, grip = dice.colour("paint", "wood", "fabric"), dice.colour("dark", "paint")
    metal, rubber = dice.colour("metal", "dark"), dice.colour("paint", "pale", "dark")
    share = np.linspace(-1, 1, 19)
    bend = np.where(share > 0, kick_front, kick_back) * np.maximum(np.abs(share) - 0.62, 0) * half
    path = upright(np.stack([share * half, clear + 0.06 + bend], axis=-1))
    breadth = (1 - np.abs(0.985 * share) ** dice.pick(2.5, 5.0, 10.0)) ** 0.45
    breadth *= 1 - dice.between(0.0, 0.25) * np.exp(-((share / 0.4) ** 2))
    scale = np.stack([breadth, np.ones(19)], axis=-1)
    yield Piece("deck", sweep(path, rectangle(width, thickness, 0.4 * thickness), scale, across=(0, 0, 1)), board)
    sheet = sweep(path[2:-2], rectangle(0.96 * width, 0.012), scale[2:-2], across=(0, 0, 1))
    yield Piece("grip", sheet.moved(y=0.5 * thickness), grip)

    wheel, track = dice.between(0.08, 0.14), 0.5 * width * dice.between(0.7, 1.05)
    roll = lathe([(0, -0.05), (0.8 * wheel, -0.05), (wheel, -0.03), (wheel, 0.03), (0.8 * wheel, 0.05), (0, 0.05)], 14)
    truck = box(0.14, clear + 0.06 - wheel, 0.12).tapered(x=1.6, z=1.4)
    bolt = cylinder(0.02, 0.02, 8).moved(y=clear + 0.06 + 0.5 * thickness)
    bolts: tuple[float, ...] = dice.pick((), (0.0,), (-0.06, 0.06))
    for x in (-half * dice.between(0.5, 0.72), half * dice.between(0.5, 0.72)):
        yield Piece("truck", post((x, wheel, -track), (x, wheel, track), 0.03, sides=8), metal)
        yield Piece("truck", truck.moved(x, wheel), metal)
        for z in (-track, track):
            yield Piece("wheel", roll.turned("x", 90).moved(x, wheel, z), rubber)
            yield from (Piece("truck", bolt.moved(x + offset, z=0.4 * z), metal) for offset in bolts)
    if dice.chance(0.3):
        pad = cylinder(0.5 * clear, 0.7 * clear, dice.pick(6, 12, 18)).turned("z", dice.between(60, 90))
        yield Piece("brake", pad.moved(x=-0.75 * half, y=clear), rubber)
    if dice.chance(0.2):
        x, y, z = 0.72 * half, clear + dice.between(0.8, 1.3), 0.5 * width
        yield Piece("bar", post((0.85 * half, clear, 0), (x, y, 0), 0.03), metal)
        yield Piece("bar", cylinder(0.028, 2 * z, 10).turned("x", 90).moved(x, y, -z), rubber)
