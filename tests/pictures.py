"""Small image files for tests of what reads images."""

from pathlib import Path

import numpy as np
from PIL import Image


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that tells one view from every other."""
    return (40 + 5 * (number % 40), 200 - 3 * (number % 60), (37 * number) % 256)


def write_picture(path: Path, number: int, size: int = 16) -> None:
    """A file of one colour, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour_of(number)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def number_seen(view: np.ndarray, count: int) -> int:
    """Which of the first so many colours an image has, whatever a lossy format made of it."""
    mean = view.reshape(-1, 3).mean(axis=0)
    return int(np.argmin([np.abs(mean - colour_of(number)).sum() for number in range(count)]))
