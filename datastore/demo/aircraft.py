"""Things that fly: aeroplane, rocket. Some rockets lie on their side, as winged missiles do."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from datastore.demo.dice import Colour, Dice, Piece
from datastore.demo.solids import Place, Solid, box, cylinder, ellipsoid, lathe, loft, post, smooth


def fin(root: Place, tip: Place, root_chord: float, tip_chord: float, thickness: float) -> Solid:
    """A wing from root to tip, which are the front ends of its chords; the chords run backwards along x."""
    along = np.subtract(tip, root)
    upward = np.cross((1, 0, 0), along / np.linalg.norm(along))
    upward /= np.linalg.norm(upward)
    # a coarse aerofoil: share of the chord behind the front end, share of the thickness above or below the middle
    behind = np.array([0.0, 0.12, 0.4, 0.75, 1.0, 0.75, 0.4, 0.12])[:, None]
    above = np.array([0.0, 0.4, 0.5, 0.25, 0.0, -0.25, -0.5, -0.4])[:, None]
    rings = []
    for share in (0.0, 0.33, 0.67, 1.0):
        chord = root_chord + share * (tip_chord - root_chord)
        rings.append(root + share * along - behind * (chord, 0, 0) + above * thickness * chord / root_chord * upward)
    return loft(np.stack(rings))


def aeroplane(dice: Dice) -> Iterator[Piece]:
    """A fuselage along x with wings and a tail: airliner, jet, propeller plane, biplane, glider."""
    style = dice.pick("airliner", "airliner", "jet", "propeller", "biplane", "glider")
    half = dice.between(0.8, 1.2)
    match style:
        case "airliner":
            girth, reach, backward, width, taper = (0.1, 0.16), (0.85, 1.2), (0.3, 0.65), (0.3, 0.48), (0.3, 0.7)
        case "jet":
            girth, reach, backward, width, taper = (0.08, 0.13), (0.45, 0.75), (0.5, 1.0), (0.6, 1.0), (0.05, 0.35)
        case "glider":
            girth, reach, backward, width, taper = (0.06, 0.09), (1.2, 1.7), (0.0, 0.15), (0.18, 0.28), (0.4, 0.95)
        case _:
            girth, reach, backward, width, taper = (0.1, 0.17), (0.8, 1.15), (0.0, 0.15), (0.3, 0.48), (0.5, 1.0)
    radius, span, chord = dice.between(*girth), dice.between(*reach), dice.between(*width)
    sweep_back, tip = span * dice.between(*backward), chord * dice.between(*taper)
    paint, second = dice.colour("pale", "metal", "paint"), dice.colour("paint", "dark")
    yield Piece("fuselage", _fuselage(radius, half, dice.between(0.7, 1.0)), paint)

    front, rise = dice.between(0.05, 0.3) * half + 0.4 * chord, span * dice.between(-0.05, 0.15)
    levels = [-0.8 * radius, 1.5 * radius] if style == "biplane" else [dice.pick(-0.6, 0.0, 0.7) * radius]
    for y in levels:
        wing = fin((front, y, 0.0), (front - sweep_back, y + rise, span), chord, tip, 0.13 * chord)
        for solid in (wing, wing.mirrored("z")):
            yield Piece("wing", solid, second if style == "biplane" else paint)
    if style == "biplane":
        for share in (-0.7, -0.1, 0.1, 0.7):
            x, z, lift = front - 0.3 * chord, share * span, abs(share) * rise
            yield Piece("strut", post((x, levels[0] + lift, z), (x, levels[1] + lift, z), 0.012, sides=6), second)

    yield from _tail(dice, half, radius, span * dice.between(0.25, 0.42), second)
    match style:
        case "propeller" | "biplane":
            yield from _propeller(dice, radius, half, second)
        case "airliner":
            pod = _pod(dice.between(0.05, 0.08))
            x, y = front - 0.1 * chord, levels[0] - 0.09
            hung = [(x - share * sweep_back, y + share * rise, share * span) for share in (0.3, 0.6)]
            for x, y, z in dice.pick(hung[:1], hung[:1], hung, [(-0.55 * half, 0.35 * radius, 1.25 * radius)]):
                for side in (-z, z):
                    yield Piece("engine", pod.moved(x, y, side), second)
        case "jet":
            nozzle = cylinder(0.075, 0.2).tapered(0.8, 0.8).turned("z", 90).moved(x=0.08 - half)
            for z in dice.pick((0.0,), (-0.06, 0.06)):
                yield Piece("engine", nozzle.moved(z=z), (70, 70, 74))
    if dice.chance(0.6):
        glass = ellipsoid(0.16, 0.4 * radius, 0.55 * radius, 12)
        yield Piece("cockpit", glass.moved(x=0.62 * half, y=0.72 * radius), (40, 52, 70))
    if dice.chance(0.3):
        yield from _gear(radius, half)


def _fuselage(radius: float, half: float, waist: float) -> Solid:
    shares = [(0.15, -1.0), (0.55, -0.6), (waist, 0.0), (1.0, 0.5), (0.75, 0.85), (0.2, 1.0)]
    outline = smooth(np.array(shares) * (radius, half), 4)
    return lathe([(0, -half), *outline.tolist(), (0, 1.01 * half)], 16).turned("z", -90)


def _tail(dice: Dice, half: float, radius: float, span: float, colour: Colour) -> Iterator[Piece]:
    chord, rise = dice.between(0.18, 0.35), dice.between(0.22, 0.42)
    x = 1.1 * chord - half
    yield Piece("tail", fin((x, 0.0, 0.0), (x - 0.6 * chord, rise, 0.0), chord, 0.6 * chord, 0.03), colour)
    y = 0.95 * rise if dice.chance(0.3) else 0.1 * radius
    wing = fin((x - 0.3 * chord, y, 0.0), (x - 0.7 * chord, y, span), 0.8 * chord, 0.45 * chord, 0.025)
    for solid in (wing, wing.mirrored("z")):
        yield Piece("tail", solid, colour)


def _propeller(dice: Dice, radius: float, half: float, colour: Colour) -> Iterator[Piece]:
    yield Piece("engine", ellipsoid(0.06, 0.3 * radius, 0.3 * radius, 10).moved(x=1.02 * half), colour)
    blade = box(0.015, dice.between(1.6, 2.4) * radius, 0.05, bevel=0.004).moved(x=1.02 * half + 0.01)
    blades, start = dice.whole(2, 4), dice.between(0, 90)
    for turn in (start + np.arange(blades) * (360 / blades)).tolist():
        yield Piece("engine", blade.turned("x", turn), (40, 40, 44))


def _pod(size: float) -> Solid:
    """An engine in its casing, open in front (+x)."""
    outside = [(0.5 * size, -0.13), (0.9 * size, -0.05), (size, 0.08), (0.85 * size, 0.12)]
    return lathe([(0, -0.11), *outside, (0.7 * size, 0.09), (0, 0.08)], 14).turned("z", -90)


def _gear(radius: float, half: float) -> Iterator[Piece]:
    wheel = cylinder(0.06, 0.04, 12).moved(y=-0.02).turned("x", 90)
    y = -1.5 * radius - 0.06
    for x, z in ((0.6 * half, 0.0), (0.0, 0.16), (0.0, -0.16)):
        yield Piece("gear", wheel.moved(x, y, z), (30, 30, 32))
        yield Piece("gear", post((x, y, z), (x, -0.4 * radius, 0.4 * z), 0.012, sides=6), (120, 124, 130))


def rocket(dice: Dice) -> Iterator[Piece]:
    """A pointed body with fins, of one stage or two, sometimes with boosters; most stand, some fly."""
    lean = dice.between(-90, -60) if dice.chance(0.25) else 0.0
    for piece in _standing_rocket(dice):
        yield replace(piece, solid=piece.solid.turned("z", lean))


def _standing_rocket(dice: Dice) -> Iterator[Piece]:
    height, radius, foot = dice.between(1.3, 2.4), dice.between(0.14, 0.34), dice.between(0.05, 0.2)
    paint, second = dice.colour("pale", "metal", "paint"), dice.colour("paint", "dark")
    brow = height * dice.between(0.6, 0.85)  # where the nose begins
    if dice.chance(0.35):  # a cigar
        belly = radius * dice.between(1.1, 1.5)
        outline = smooth([(0.75 * radius, foot), (belly, foot + 0.3 * height), (0.9 * radius, brow)], 5)
    else:
        stage, upper = height * dice.between(0.3, 0.5), radius * dice.pick(1.0, dice.between(0.55, 0.85))
        outline = np.array([(radius, foot), (radius, stage), (upper, stage + 0.08 * height), (upper, brow)])
    yield Piece("body", lathe([(0, foot), *outline.tolist(), (0, brow)], 20), paint)
    top = float(outline[-1, 0]) + 0.004
    flank = smooth([(top, brow), (top * dice.between(0.5, 0.9), 0.5 * (brow + height)), (0.06 * top, height - 0.01)], 5)
    yield Piece("nose", lathe([(0, brow - 0.01), *flank.tolist(), (0, height)], 20), second)

    fins, turn = dice.pick(3, 4, 4, 5), dice.between(0, 90)
    reach, chord, drop = radius * dice.between(1.8, 3.0), height * dice.between(0.12, 0.35), dice.between(0.0, 0.2)
    root, tip = (foot + chord, 0.0, 0.6 * radius), (foot + 0.3 * chord - drop, 0.0, reach)
    blade = fin(root, tip, chord, 0.5 * chord, 0.05).turned("z", 90)  # drawn with its front to +x, then stood up
    for number in range(fins):
        yield Piece("fin", blade.turned("y", turn + number * 360 / fins), second)

    flames = dice.whole(1, 3)
    throat, mouth = radius * 0.35 / flames**0.5, radius * 0.7 / flames**0.5
    bell = lathe([(0, -0.12), (mouth, -0.12), (0.6 * mouth, 0.02), (throat, 0.1), (0, 0.1)], 14)
    for number in range(flames):
        place = bell.moved(x=0.0 if flames == 1 else 0.45 * radius, y=foot)
        yield Piece("engine", place.turned("y", number * 360 / flames), (84, 84, 90))
    if dice.chance(0.3):
        for solid in _boosters(radius, foot, radius * dice.between(0.35, 0.6), height * dice.between(0.35, 0.65)):
            yield Piece("booster", solid.turned("y", turn), paint)
    if dice.chance(0.5):
        port = ellipsoid(0.3 * radius, 0.3 * radius, 0.1, 14)
        for y in dice.pick((0.6 * brow,), (0.5 * brow, 0.75 * brow)):
            wall = float(np.interp(y, outline[:, 1], outline[:, 0]))
            yield Piece("window", port.moved(y=y, z=wall - 0.04), (60, 90, 120))


def _boosters(radius: float, foot: float, side: float, rise: float) -> Sequence[Solid]:
    profile = [(0, foot - 0.05), (side, foot - 0.05), (side, rise), (0.6 * side, rise + 0.1), (0, rise + 0.17)]
    booster = lathe(profile, 14).moved(x=radius + 0.9 * side)
    return booster, booster.turned("y", 180)
