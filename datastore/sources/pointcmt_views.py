"""PointCMT's 20 views of each ModelNet40 shape, beside the re-sampled clouds with normals of the same names."""

from dataclasses import replace
from itertools import islice
from typing import ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import Images, Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, SourceImages
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from datastore.sources.modelnet40_resampled import ModelNet40Resampled

_VIEWS: Final = "ModelNet40_mv_20view"
_CLOUDS: Final = "modelnet40_normal_resampled"
_NUM_VIEWS: Final = 20
_SHAPES_LOOKED_AT: Final = 64


class PointCmtViews:
    """`ModelNet40_mv_20view/<class>/<split>/<name>_001.png` and `modelnet40_normal_resampled/<class>/<name>.txt`."""

    FORMAT: ClassVar[str] = "pointcmt"
    LOOKS_LIKE: ClassVar[str] = f"a folder with {_VIEWS}/<class>/<split>/<name>_001.png beside {_CLOUDS}"

    def __init__(self, url: str, listing: Listing, clouds: ModelNet40Resampled) -> None:
        self.url = url
        self.listing = listing
        self._clouds = clouds
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether the folder of views is there."""
        return _VIEWS in files.entries()

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The clouds as their own lists have them, each with its views."""
        if not files.exists(_CLOUDS):
            raise SourceError(
                f"{files.where(_CLOUDS)} is missing: the views are of the shapes in it. Put ModelNet40's re-sampled "
                f"clouds beside {_VIEWS}"
            )
        # never one of its caches: they hold the clouds in another order and number
        clouds = ModelNet40Resampled.open(SourceFiles(files.where(_CLOUDS)), replace(options, variant="modelnet40"))
        first_images = (_view_paths(shape)[0] for shape in islice(clouds.listing.shapes, _SHAPES_LOOKED_AT))
        images = SourceImages(_NUM_VIEWS, first_image_size(files, first_images))
        return cls(files.url, replace(clouds.listing, images=images), clouds)

    def load(self, shape: ShapeReference) -> Shape:
        """One cloud with its normals, and its views by their numbers."""
        images = self.listing.images
        assert images is not None, "open always sets them"
        cloud = self._clouds.load(shape).geometry
        return Shape(cloud, Images(read_views(self._files, _view_paths(shape), images.image_size)))


def _view_paths(shape: ShapeReference) -> list[str]:
    class_name = shape.id.rpartition("_")[0]  # which may have underscores of its own
    return [f"{_VIEWS}/{class_name}/{shape.split}/{shape.id}_{view:03d}.png" for view in range(1, _NUM_VIEWS + 1)]
