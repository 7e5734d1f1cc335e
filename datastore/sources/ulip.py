"""ULIP's ShapeNet-55: the clouds of ShapeNet-55, and 30 renders of each shape, one every 12 degrees around."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import Images, Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, SourceImages
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from datastore.sources.shapenet55 import ShapeNet55
from datastore.sources.shapenet_names import CATEGORY_OF_SYNSET

_RENDERS: Final = "rendered_images"
_CLOUDS: Final = "shapenet_pc"
_TAXONOMY: Final = "taxonomy.json"
_FOLDERS: Final = ("", "shapenet-55")  # of the data set, below the URL
_DEGREES: Final = range(0, 360, 12)  # three digits in the names; the same with _depth0001 and the like are no views
_SHAPES_LOOKED_AT: Final = 64


class Ulip:
    """`rendered_images/<synset>-<model>/<synset>-<model>_r_000.png` beside `shapenet_pc/<synset>-<model>.npy`."""

    FORMAT: ClassVar[str] = "ulip"
    LOOKS_LIKE: ClassVar[str] = (
        f"a folder with {_RENDERS}/<synset>-<model>/*_r_000.png, {_TAXONOMY}, {_CLOUDS} and ShapeNet-55's lists"
    )

    def __init__(self, url: str, listing: Listing, clouds: ShapeNet55) -> None:
        self.url = url
        self.listing = listing
        self._clouds = clouds
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether renders and clouds lie side by side."""
        return any({_RENDERS, _CLOUDS} <= set(files.entries(folder)) for folder in _FOLDERS)

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The clouds as ShapeNet-55's lists have them, each with its renders."""
        folder = next((folder for folder in _FOLDERS if _CLOUDS in files.entries(folder)), None)
        if folder is None:
            raise SourceError(
                f"{files.where(_CLOUDS)} is missing: fetch ShapeNet-55's clouds, and put them beside {_RENDERS}"
            )
        files = SourceFiles(files.where(folder))
        clouds = ShapeNet55.open(files, options)
        # the single images of another method may lie there too
        clouds.listing = replace(clouds.listing, images=None)
        first_images = (_view_paths(shape)[0] for shape in islice(clouds.listing.shapes, _SHAPES_LOOKED_AT))
        listing = replace(
            clouds.listing,
            class_names=_class_names(files),
            images=SourceImages(len(_DEGREES), first_image_size(files, first_images)),
        )
        return cls(files.url, listing, clouds)

    def load(self, shape: ShapeReference) -> Shape:
        """One cloud, and its renders by rising angle."""
        images = self.listing.images
        assert images is not None, "open always sets them"
        cloud = self._clouds.load(shape).geometry
        return Shape(cloud, Images(read_views(self._files, _view_paths(shape), images.image_size)))


def _class_names(files: SourceFiles) -> tuple[str, ...]:
    """The first name that the taxonomy gives each of the 55 synsets; with the synset where several share it."""
    names = dict(CATEGORY_OF_SYNSET)
    if files.exists(_TAXONOMY):
        try:
            taxonomy: Any = json.loads(files.text(_TAXONOMY))
            # ShapeNet writes a list of objects, many for parts of the 55; a plain mapping says the same
            pairs = taxonomy if isinstance(taxonomy, dict) else {entry["synsetId"]: entry["name"] for entry in taxonomy}
            known = {synset: pairs[synset] for synset in names if synset in pairs}
            names |= {synset: value if isinstance(value, str) else ",".join(value) for synset, value in known.items()}
        except (ValueError, TypeError, LookupError) as error:
            raise SourceError(
                f"{files.where(_TAXONOMY)} does not map synsets to names ({type(error).__name__}: {error}). Fetch it "
                f"again"
            ) from error
    first_names = {synset: several.split(",")[0].strip() or synset for synset, several in names.items()}
    times = Counter(first_names.values())
    return tuple(name if times[name] == 1 else f"{name} ({synset})" for synset, name in first_names.items())


def _view_paths(shape: ShapeReference) -> list[str]:
    return [f"{_RENDERS}/{shape.id}/{shape.id}_r_{degrees:03d}.png" for degrees in _DEGREES]
