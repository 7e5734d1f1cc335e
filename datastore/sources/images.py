"""Images that a source has of its shapes, as arrays: RGB, composited on white where they are transparent."""

import io
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from datastore.errors import SourceError
from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles

_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_COLOUR_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
"""Others (16-bit grey, floats) are depth maps and the like; squeezed into 8 bits they would be no view of anything."""

_FETCHED_AT_ONCE: Final = 8

_DECODING_FAILS: Final = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error)  # by kind of damage


def read_views(files: SourceFiles, paths: Sequence[str], size: int) -> UInt8[np.ndarray, "v h w 3"]:
    """The images of one shape, in the order of their paths. ShapeError where one is missing, damaged or of another size."""
    views = np.empty((len(paths), size, size, 3), np.uint8)
    missing = []
    for number, (path, content) in enumerate(zip(paths, _contents(files, paths), strict=True)):
        if isinstance(content, bytes):
            views[number] = _decoded(content, files.where(path), size)
        elif files.exists(path):
            raise ShapeError(str(content)) from content
        else:
            missing.append(path)
    if missing:
        more = f" and {len(missing) - 3} more" if missing[3:] else ""
        raise ShapeError(
            f"{len(missing)} of its {len(paths)} images are missing: {', '.join(map(files.where, missing[:3]))}{more}"
        )
    return views


def first_image_size(files: SourceFiles, paths: Iterable[str]) -> int:
    """How many pixels a side the first image has that can be opened; all others have to agree.

    SourceError where none of the paths is an image, or where the first one is not square.
    """
    tried = None
    for path in paths:
        tried = tried or path
        try:
            width, height = _opened(files.read(path), files.where(path)).size
        except SourceError:
            continue  # what is wrong with one shape is said when that shape is read
        if width != height:
            raise SourceError(
                f"{files.where(path)} has {width} x {height} pixels. A store keeps square views: bring them all to one "
                f"square size"
            )
        return width
    raise SourceError(
        f"{files.where(tried or '')} and the images after it cannot be read: there are no views to take. "
        f"Fetch them, or check that they lie where the format has them"
    )


def _contents(files: SourceFiles, paths: Sequence[str]) -> Iterator[bytes | SourceError]:
    """Each file, or why it cannot be read. Remote ones are fetched side by side: what takes time is waiting."""

    def content(path: str) -> bytes | SourceError:
        try:
            return files.read(path)
        except SourceError as error:
            return error

    if files.is_local:
        yield from map(content, paths)
        return
    with ThreadPoolExecutor(_FETCHED_AT_ONCE, thread_name_prefix="fetch-images") as pool:
        yield from pool.map(content, paths)


def _decoded(content: bytes, where: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    image = _opened(content, where)
    if image.size != (size, size):
        raise ShapeError(f"{where} has {image.width} x {image.height} pixels, and the first image has {size} x {size}")
    if image.mode not in _COLOUR_MODES:
        raise ShapeError(f"{where} holds pixels of mode {image.mode!r}, which is no colour image of 8 bits a channel")
    try:
        image.load()
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        # what colour lies under transparent pixels is chance: renderers leave black there
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, transparent).convert("RGB"))
    except _DECODING_FAILS as error:
        raise ShapeError(f"{where} is damaged ({error}): fetch it again") from error


def _opened(content: bytes, where: str) -> Image.Image:
    """The image, of which so far only the header is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked before decoding
            return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ShapeError(
            f"{where} is no PNG, JPEG or WebP image, or only the beginning of one: fetch it again"
        ) from error
    except (*_DECODING_FAILS, Image.DecompressionBombError) as error:
        raise ShapeError(f"{where} is damaged ({error}): fetch it again") from error
