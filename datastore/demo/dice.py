"""Seeded choices: how one shape of a class comes to differ from the next."""

import colorsys
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np

from datastore.demo.solids import Solid

Colour = tuple[int, int, int]
Material = Literal["wood", "metal", "dark", "fabric", "paint", "ceramic", "glass", "brass", "pale", "leaf"]
Option = TypeVar("Option")

# hue, saturation and value are each drawn from a range
_PALETTES: Final[dict[Material, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]]] = {
    "wood": ((0.05, 0.11), (0.35, 0.75), (0.40, 0.85)),
    "metal": ((0.55, 0.65), (0.00, 0.10), (0.50, 0.85)),
    "dark": ((0.00, 1.00), (0.00, 0.25), (0.10, 0.28)),
    "fabric": ((0.00, 1.00), (0.20, 0.65), (0.40, 0.85)),
    "paint": ((0.00, 1.00), (0.50, 0.90), (0.50, 0.95)),
    "ceramic": ((0.00, 1.00), (0.05, 0.50), (0.65, 0.95)),
    "glass": ((0.25, 0.58), (0.20, 0.60), (0.45, 0.85)),
    "brass": ((0.10, 0.14), (0.50, 0.75), (0.60, 0.85)),
    "pale": ((0.08, 0.16), (0.03, 0.20), (0.85, 0.97)),
    "leaf": ((0.22, 0.38), (0.45, 0.80), (0.35, 0.65)),
}


@dataclass(frozen=True)
class Piece:
    """One solid of a shape: the part that it belongs to, and its colour."""

    part: str
    solid: Solid
    colour: Colour


class Dice:
    """Draws from one generator; the same seed gives the same shape."""

    def __init__(self, seed: list[int]) -> None:
        self._generator = np.random.default_rng(seed)

    def between(self, low: float, high: float) -> float:
        """A number from the range, all equally likely."""
        return low + (high - low) * float(self._generator.random())

    def whole(self, low: int, high: int) -> int:
        """A whole number from the range, both ends included."""
        return int(self._generator.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(self._generator.random()) < probability

    def pick(self, *options: Option) -> Option:
        """One of the options, all equally likely; name one twice and it comes twice as often."""
        return options[self.whole(0, len(options) - 1)]

    def colour(self, *materials: Material) -> Colour:
        """A colour that one of the materials might have."""
        hue, saturation, value = (self.between(*limits) for limits in _PALETTES[self.pick(*materials)])
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)
