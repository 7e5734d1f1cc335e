"""What holds a seat, a table top or a bed up: the same ten ways for all of them, so that legs alone tell no class."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from datastore.demo.dice import Dice
from datastore.demo.solids import Solid, box, cylinder, lathe, post, sideways, smooth, tube, upright

Support = Literal["four", "splayed", "three", "pedestal", "star", "sled", "trestle", "panels", "crossed", "plinth"]


def support(dice: Dice, style: Support, width: float, depth: float, height: float, thickness: float) -> Iterator[Solid]:
    """Solids that fill the room under a top of this width and depth, from the ground to `height`."""
    x, z = width / 2 - thickness, depth / 2 - thickness
    match style:
        case "four":
            yield from _four(dice, x, z, height, thickness, splay=0.0)
        case "splayed":
            yield from _four(dice, x, z, height, thickness, splay=dice.between(0.12, 0.3))
        case "three":
            yield from _three(dice, min(x, z), height, thickness)
        case "pedestal":
            yield _pedestal(dice, min(width, depth) * dice.between(0.28, 0.48), height, thickness)
        case "star":
            yield from _star(dice, min(width, depth) * dice.between(0.45, 0.62), height, thickness)
        case "sled":
            yield from _sled(dice, x, z, height, thickness)
        case "trestle":
            yield from _trestle(dice, x, z, height, thickness)
        case "panels":
            yield from _panels(dice, x * dice.between(0.8, 1.0), depth * dice.between(0.75, 1.0), height, thickness)
        case "crossed":
            yield from _crossed(dice, x, z, height, thickness)
        case "plinth":
            yield box(width * dice.between(0.8, 0.98), height, depth * dice.between(0.8, 0.98))


def _four(dice: Dice, x: float, z: float, height: float, thickness: float, splay: float) -> Iterator[Solid]:
    radius, taper, sides = thickness * dice.between(0.6, 0.95), dice.between(0.5, 1.05), dice.pick(4, 4, 8, 12)
    spread = splay * height
    turned = dice.chance(0.15)
    for sign_x in (-1, 1):
        for sign_z in (-1, 1):
            foot = (sign_x * (x + spread), 0.0, sign_z * (z + spread))
            top = (sign_x * x * 0.97, height, sign_z * z * 0.97)
            if turned:  # on a lathe: a foot, a swelling, a waist and a bead
                yield tube(np.linspace(foot, top, 9), radius, 10, (0.6, 0.9, 0.6, 0.7, 0.9, 1.0, 0.7, 1.15, 1.15))
            else:
                yield post(foot, top, radius * taper, radius, sides)
    if dice.chance(0.4):
        share = dice.between(0.15, 0.6)
        reach_x, reach_z = x + spread * (1 - share), z + spread * (1 - share)
        yield from _stretchers(dice, reach_x, reach_z, share * height, 0.5 * radius)


def _stretchers(dice: Dice, x: float, z: float, height: float, radius: float) -> Iterator[Solid]:
    """Bars between four legs: all around, or an H."""
    for side in (-x, x):
        yield post((side, height, -z), (side, height, z), radius, sides=6)
    for side in (0.0,) if dice.chance(0.5) else (-z, z):
        yield post((-x, height, side), (x, height, side), radius, sides=6)


def _three(dice: Dice, reach: float, height: float, thickness: float) -> Iterator[Solid]:
    radius, taper = thickness * dice.between(0.6, 0.9), dice.between(0.5, 1.0)
    outer, inner = reach * dice.between(1.15, 1.6), reach * dice.between(0.4, 0.9)
    for angle in np.radians(dice.between(0, 360) + np.array([0, 120, 240])).tolist():
        x, z = np.cos(angle), np.sin(angle)
        yield post((outer * x, 0.0, outer * z), (inner * x, height, inner * z), radius * taper, radius)


def _pedestal(dice: Dice, reach: float, height: float, thickness: float) -> Solid:
    stem, plate = thickness * dice.between(0.7, 1.6), height * dice.between(0.03, 0.08)
    if dice.chance(0.5):  # a disc
        foot = [(reach, 0.0), (reach, plate), (1.2 * stem, 1.6 * plate), (stem, 3 * plate)]
    else:  # a cone that runs into the stem
        flank = smooth([(0.6 * reach, 2 * plate), (1.3 * stem, 0.3 * height), (stem, 0.5 * height)], 3)
        foot = [(reach, 0.0), (0.93 * reach, 0.6 * plate), *flank.tolist()]
    head = dice.pick(1.0, 1.0, 2.2) * stem
    return lathe([(0, 0), *foot, (stem, 0.85 * height), (head, height), (0, height)], 20)


def _star(dice: Dice, reach: float, height: float, thickness: float) -> Iterator[Solid]:
    stem, arms = thickness * dice.between(0.6, 1.0), dice.whole(4, 5)
    hub = height * dice.between(0.18, 0.28)
    wheel = 0.35 * hub if dice.chance(0.7) else 0.0
    low, high = 0.6 * hub, 1.3 * hub
    yield lathe([(0, low), (1.6 * stem, low), (1.6 * stem, high), (stem, 1.5 * hub), (stem, height), (0, height)], 14)
    for angle in np.radians(np.arange(arms) * (360 / arms) + dice.between(0, 90)).tolist():
        x, z = reach * np.cos(angle), reach * np.sin(angle)
        yield post((0.0, hub, 0.0), (x, 2 * wheel + 0.3 * thickness, z), 0.7 * stem, 0.4 * stem, 6)
        if wheel:
            yield cylinder(wheel, wheel, 10).turned("x", 90).moved(0.97 * x, wheel, 0.97 * z - wheel / 2)


def _sled(dice: Dice, x: float, z: float, height: float, thickness: float) -> Iterator[Solid]:
    """Two bent bars that slide on the ground."""
    radius = thickness * dice.between(0.35, 0.6)
    along_x = dice.chance(0.3)
    reach, side = (x, z) if along_x else (z, x)
    bend = min(0.25 * height, 0.4 * reach)
    foot = reach * dice.between(0.9, 1.15)
    corners = [
        (-reach, height),
        (-foot, bend),
        (bend - foot, radius),
        (foot - bend, radius),
        (foot, bend),
        (reach, height),
    ]
    bar = smooth(corners, 4)
    for place in (-side, side):
        yield tube(upright(bar, place) if along_x else sideways(bar, place), radius, 8)


def _trestle(dice: Dice, x: float, z: float, height: float, thickness: float) -> Iterator[Solid]:
    inset, plate = x * dice.between(0.65, 0.95), 0.08 * height
    stem = thickness * dice.between(0.8, 1.3)
    foot = box(2.2 * thickness, plate, 2 * z)
    upper = box(stem, height - plate, stem * dice.between(1.0, 2.5)).moved(y=plate)
    for side in (-inset, inset):
        yield from (foot.moved(x=side), upper.moved(x=side))
    if dice.chance(0.7):
        yield box(2 * inset, 1.6 * thickness, thickness).moved(y=height * dice.between(0.2, 0.6))


def _panels(dice: Dice, x: float, depth: float, height: float, thickness: float) -> Iterator[Solid]:
    board = box(1.4 * thickness, height, depth)
    yield from (board.moved(x=-x), board.moved(x=x))
    if dice.chance(0.5):
        yield box(2 * x, height * dice.between(0.2, 0.5), thickness).moved(y=height * dice.between(0.1, 0.45))


def _crossed(dice: Dice, x: float, z: float, height: float, thickness: float) -> Iterator[Solid]:
    radius, sides = thickness * dice.between(0.5, 0.8), dice.pick(4, 10)
    turn = dice.pick(0.0, 90.0, 90.0)
    reach, side = (x, z) if turn == 0 else (z, x)
    for place in (-side, side):
        for way in (-1, 1):
            offset = place + way * 0.5 * radius  # the two bars pass beside each other
            bar = post((way * reach, 0.0, offset), (-way * reach, height, offset), radius, sides=sides)
            yield bar.turned("y", turn)
    yield post((0, height / 2, -side), (0, height / 2, side), 0.7 * radius).turned("y", turn)
