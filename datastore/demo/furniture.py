"""Things that fill a room: bed, table, bookshelf, ladder."""

from collections.abc import Iterator

import numpy as np

from datastore.demo.dice import Colour, Dice, Piece
from datastore.demo.solids import box, circle, ellipsoid, post, prism, rectangle
from datastore.demo.supports import Support, support


def bed(dice: Dice) -> Iterator[Piece]:
    """A mattress on a frame: single, double, four-poster or bunk."""
    style = dice.pick("plain", "plain", "plain", "plain", "posts", "bunk")
    width = dice.between(0.75, 1.0) if style == "bunk" else dice.between(0.8, 1.8)
    length, foot = dice.between(1.5, 2.1), dice.between(0.05, 0.35)
    rail, mattress, timber = dice.between(0.08, 0.2), dice.between(0.1, 0.26), dice.between(0.04, 0.09)
    frame, sheet, cover = dice.colour("wood", "wood", "metal", "pale"), dice.colour("pale"), dice.colour("fabric")
    decks = [foot, foot + dice.between(0.8, 1.1)] if style == "bunk" else [foot]
    top = decks[-1] + rail + mattress
    match style:
        case "posts":
            height = top + dice.between(0.6, 1.2)
            yield from _bed_posts(dice, width, length, height, timber, frame)
            yield from _canopy(dice, width, length, height, timber, frame, cover)
        case "bunk":
            yield from _bed_posts(dice, width, length, top + 0.25, timber, frame)
            x = 0.52 * width
            for z in (0.22 * length, 0.4 * length):
                yield Piece("leg", post((x, 0, z), (x, top + 0.25, z), 0.025, sides=6), frame)
            for y in np.arange(0.2, top, 0.25).tolist():
                yield Piece("leg", post((x, y, 0.22 * length), (x, y, 0.4 * length), 0.02, sides=6), frame)
        case _:
            legs: Support = dice.pick("four", "four", "plinth", "panels", "sled")
            for leg in support(dice, legs, width, length, foot, timber):
                yield Piece("leg", leg, frame)
    blanket = box(1.01 * width, 0.05, length * dice.between(0.5, 0.75), bevel=0.02, steps=2)
    pillows = 1 if width < 1.15 else 2
    for deck in decks:
        surface = deck + 0.7 * rail + mattress
        yield Piece("frame", box(width + 0.06, rail, length + 0.06).moved(y=deck), frame)
        soft = box(0.98 * width, mattress, 0.98 * length, bevel=0.3 * mattress, steps=3)
        yield Piece("mattress", soft.moved(y=surface - mattress), sheet)
        yield Piece("mattress", blanket.moved(y=surface - 0.02, z=0.12 * length), cover)
        for x in ((np.arange(pillows) - (pillows - 1) / 2) * (0.46 * width)).tolist():
            pillow = ellipsoid(0.4 * width / pillows, 0.07, 0.16, 16)
            yield Piece("pillow", pillow.moved(x, surface + 0.04, -0.38 * length), sheet)
    head = dice.between(0.15, 0.85)
    yield from _boards(dice, width, length, foot, rail + mattress, head, dice.pick(frame, frame, cover))


def _bed_posts(
    dice: Dice, width: float, length: float, height: float, timber: float, colour: Colour
) -> Iterator[Piece]:
    sides = dice.pick(4, 12)
    for x in (-width / 2, width / 2):
        for z in (-length / 2, length / 2):
            yield Piece("leg", post((x, 0, z), (x, height, z), timber, sides=sides), colour)


def _canopy(
    dice: Dice, width: float, length: float, height: float, timber: float, frame: Colour, cloth: Colour
) -> Iterator[Piece]:
    for side in (-0.5, 0.5):
        yield Piece("canopy", box(width, timber, timber).moved(y=height, z=side * length), frame)
        yield Piece("canopy", box(timber, timber, length).moved(y=height, x=side * width), frame)
    if dice.chance(0.4):
        yield Piece("canopy", box(width, 0.03, length).moved(y=height + timber), cloth)


def _boards(
    dice: Dice, width: float, length: float, low: float, soft: float, rise: float, colour: Colour
) -> Iterator[Piece]:
    """Boards at the head and sometimes at the foot: solid, padded or barred."""
    style = dice.pick("solid", "padded", "barred")
    lower = rise * dice.between(0.2, 0.8)
    bars, breadth = dice.whole(4, 8), width + 0.08
    for z, high in ((-length / 2 - 0.05, soft + rise), (length / 2 + 0.05, soft + lower))[: dice.pick(1, 2)]:
        match style:
            case "solid":
                yield Piece("headboard", box(breadth, high, 0.06, bevel=0.02).moved(y=low, z=z), colour)
            case "padded":
                yield Piece("headboard", box(breadth, low + high, 0.14, bevel=0.06, steps=3).moved(z=z), colour)
            case _:
                yield Piece("headboard", box(breadth, 0.08, 0.05).moved(y=low + high - 0.08, z=z), colour)
                for x in np.linspace(-width / 2, width / 2, bars).tolist():
                    yield Piece("headboard", post((x, low, z), (x, low + high - 0.04, z), 0.022, sides=6), colour)


def table(dice: Dice) -> Iterator[Piece]:
    """A top on any support, from a coffee table to a bar table."""
    (low, high), (narrow, wide) = dice.pick(
        ((0.4, 0.6), (0.42, 0.65)),  # beside a chair
        ((0.28, 0.5), (0.7, 1.3)),  # before a sofa
        ((0.65, 0.8), (0.9, 1.9)),  # to dine at
        ((0.85, 1.1), (0.6, 1.0)),  # to stand at
    )
    height, width = dice.between(low, high), dice.between(narrow, wide)
    depth = width * dice.between(0.55, 1.0)
    thickness, board = dice.between(0.03, 0.08), dice.between(0.02, 0.06)
    frame, surface = dice.colour("wood", "metal", "dark"), dice.colour("wood", "wood", "pale", "glass", "paint")
    central: tuple[Support, ...] = ("three", "pedestal", "pedestal", "star")
    style = dice.pick(*central, "four", "four", "four", "splayed", "sled", "trestle", "panels", "crossed")
    overhang = dice.between(1.0, 1.15)
    inner_width, inner_depth = width / overhang, depth / overhang
    for leg in support(dice, style, inner_width, inner_depth, height, thickness):
        yield Piece("leg", leg, frame)
    is_round, corner = dice.chance(0.6 if style in central else 0.2), depth * dice.pick(0.01, 0.1, 0.3)
    outline = circle(0.5, 28) * (width, depth) if is_round else rectangle(width, depth, corner, 4)
    yield Piece("top", prism(outline, board, bevel=0.2 * board).moved(y=height), surface)
    if style in ("four", "splayed", "panels") and not is_round and dice.chance(0.6):
        yield from _drawers(dice, inner_width - 2 * thickness, inner_depth - 2 * thickness, height, frame)
    if style in ("four", "panels", "crossed") and dice.chance(0.3):
        shelf = box(0.92 * inner_width, 0.02, 0.85 * inner_depth)
        yield Piece("shelf", shelf.moved(y=height * dice.between(0.12, 0.4)), surface)


def _drawers(dice: Dice, width: float, depth: float, height: float, colour: Colour) -> Iterator[Piece]:
    """An apron under the top; a deep one has drawers with knobs."""
    apron = dice.between(0.05, 0.3) * height
    yield Piece("drawer", box(width, apron, depth, bevel=0.005).moved(y=height - apron), colour)
    if apron > 0.1 * height:
        knob, shine = ellipsoid(0.018, 0.018, 0.018, 10), dice.colour("brass", "metal")
        for share in (-0.25, 0.25) if width > 0.6 else (0.0,):
            yield Piece("drawer", knob.moved(share * width, height - 0.5 * apron, 0.5 * depth + 0.012), shine)


def bookshelf(dice: Dice) -> Iterator[Piece]:
    """Shelves in a case, between posts or on sloping rails, filled more or less, some with doors below."""
    width, height, depth = dice.between(0.4, 1.3), dice.between(0.6, 2.0), dice.between(0.22, 0.42)
    shelves, board, foot = dice.whole(2, 6), dice.between(0.02, 0.045), dice.between(0.0, 0.12)
    wood = dice.colour("wood", "wood", "pale", "paint", "dark")
    pitch = (height - foot - board) / shelves
    style = dice.pick("case", "case", "case", "posts", "sloping")
    slope = dice.between(0.08, 0.25) if style == "sloping" else 0.0
    if style == "case":
        yield from _case(dice, width, height, depth, board, foot, wood)
    else:
        metal = dice.colour("metal", "dark", "brass", "wood")
        for x in (-width / 2, width / 2):
            yield Piece("frame", post((x, 0, -depth / 2), (x, height, -depth / 2), 0.6 * board, sides=8), metal)
            front, top = depth / 2 + slope * height / 2, depth / 2 - slope * height / 2
            yield Piece("frame", post((x, 0, front), (x, height, top), 0.6 * board, sides=8), metal)
    doors = style == "case" and dice.chance(0.25)
    fullness = dice.pick(0.0, 0.5, 0.9)
    for index in range(shelves + 1):
        y = foot + index * pitch
        deep = max(depth + slope * (height - 2 * y) / 2, 0.12)
        forward = (deep - depth) / 2
        yield Piece("shelf", box(width - 1.5 * board, board, deep).moved(y=y, z=forward), wood)
        if doors and index == 0:
            door = box(0.48 * width - board, pitch - board, 0.02)
            for x in (-0.25, 0.25):
                yield Piece("door", door.moved(x * (width - board), y + board, depth / 2), wood)
        elif index < shelves:
            for piece in _books(dice, 0.8 * width, pitch - board, 0.7 * deep, fullness):
                yield Piece(piece.part, piece.solid.moved(y=y + board, z=forward), piece.colour)


def _case(
    dice: Dice, width: float, height: float, depth: float, board: float, foot: float, wood: Colour
) -> Iterator[Piece]:
    side = box(board, height, depth)
    for x in (-0.5, 0.5):
        yield Piece("frame", side.moved(x=x * (width - board)), wood)
    if dice.chance(0.6):
        yield Piece("frame", box(width, height - foot, 0.01, bevel=0.002).moved(y=foot, z=-depth / 2), wood)
    if dice.chance(0.3):
        divider = box(board, height - foot - board, 0.95 * depth)
        yield Piece("frame", divider.moved(x=dice.between(-0.2, 0.2) * width, y=foot), wood)


def _books(dice: Dice, width: float, clear: float, depth: float, fullness: float) -> Iterator[Piece]:
    """Books side by side, with gaps where the shelf is not full."""
    thick = dice.between(0.04, 0.09)
    for slot in range(int(width / thick)):
        if dice.chance(fullness):
            book = box(0.9 * thick, clear * dice.between(0.55, 0.92), depth * dice.between(0.7, 1.0), bevel=0.0)
            yield Piece("book", book.moved(x=(slot + 0.5) * thick - width / 2), dice.colour("paint", "fabric", "pale"))


def ladder(dice: Dice) -> Iterator[Piece]:
    """Rungs between two rails: leaning or upright, straight or tapered, on one pole or as a pair of steps."""
    height, width = dice.between(1.1, 2.4), dice.between(0.3, 0.6)
    taper = dice.pick(1.0, 1.0, dice.between(0.4, 0.8))
    rungs, rail, sides = dice.whole(3, 10), dice.between(0.02, 0.045), dice.pick(4, 10)
    metal, second = dice.colour("metal", "wood", "paint"), dice.colour("metal", "wood")
    style = dice.pick("plain", "plain", "steps", "steps", "pole")
    lean = dice.between(0.2, 0.4) if style == "steps" else dice.between(0.0, 0.4)
    foot, top = 0.5 * width, 0.5 * width * taper
    top_z = -lean * height
    for side in (-1, 1):
        yield Piece("rail", post((side * foot, 0, 0), (side * top, height, top_z), rail, sides=sides), metal)
    flat, tread = style == "steps" or dice.chance(0.25), dice.between(0.08, 0.12)
    for share in ((np.arange(rungs) + 0.7) / (rungs + 0.2)).tolist():
        x, y, z = foot + share * (top - foot), share * height, share * top_z
        rung = box(2 * x, 0.025, tread).moved(0, y, z) if flat else post((-x, y, z), (x, y, z), 0.6 * rail, sides=8)
        yield Piece("rung", rung, second)
    if style == "pole":
        yield Piece("brace", post((0, 0, 2.2 * top_z - 0.2), (0, height, top_z), rail), metal)
    if style == "steps":
        for side in (-1, 1):
            yield Piece("brace", post((side * foot, 0, 2 * top_z), (side * top, height, top_z), 0.8 * rail), metal)
        for share in np.linspace(0.15, 0.7, dice.whole(1, 4)).tolist():
            x, y, z = foot + share * (top - foot), share * height, (2 - share) * top_z
            yield Piece("brace", post((-x, y, z), (x, y, z), 0.4 * rail, sides=6), metal)
        yield Piece("rung", box(2 * top + 0.06, 0.03, 0.2).moved(y=height, z=top_z), second)
