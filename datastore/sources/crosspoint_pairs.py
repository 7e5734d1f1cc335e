"""CrossPoint's pairs: a cloud in PLY and a folder of renders for each ShapeNet model, by the same synset and model.

The renders are 3D-R2N2's (24 of 137 pixels) or DISN's (36 of 224, easy and hard ones). Both write
`rendering_metadata.txt`, one camera a line, and are told apart by its columns:

    R2N2   azimuth elevation in-plane distance-ratio field-of-view
    DISN   [azimuth,elevation,pitch,distance-ratio,focal-length,sensor-size,max-distance,shift-x,shift-y,shift-z],

Angles are in degrees, lengths in ShapeNet v1's units. R2N2's fifth column, 25 throughout, is not what it was rendered with:
its camera is the same as DISN's, 35 mm before a sensor of 32 (the intrinsic matrix that Mesh R-CNN took out of Blender
has a focal length of 2.1875 half widths, which is 35 / 16). Both count azimuth from +X towards +Z, which is 90 degrees less
this in `cameras.py`; DISN moves the object along the axes of a world with +Z up, which are x, -z and y in ShapeNet's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Final, Self

import numpy as np
from jaxtyping import Float32

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import Images, PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, SourceImages, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from datastore.sources.ply_cloud import PlyHeader, read_ply_cloud, read_ply_header
from datastore.sources.shape_file import read_shape_file
from datastore.sources.shapenet_names import CATEGORY_OF_SYNSET, SHAPENET_LICENCE

_CLOUDS: Final = "ShapeNet"
_RENDERS: Final = "ShapeNetRendering"
_BASES: Final = ("", "data/")
_METADATA: Final = "rendering_metadata.txt"
_NUM_SHAPES: Final = 43_783
_VARIANTS: Final = ("easy", "hard")
_MODELS_LOOKED_AT: Final = 64  # to learn what the renders are; the first ones may be missing

# Of R2N2's camera; DISN says them in each line. Its distance ratios are ratios of the first.
_R2N2_MAX_DISTANCE: Final = 1.75
_R2N2_FOCAL_LENGTH: Final = 35.0  # millimetres
_R2N2_SENSOR_SIZE: Final = 32.0


@dataclass(frozen=True)
class _Renders:
    """One of the two sets of renders, as it lies here."""

    name: str
    num_views: int
    num_columns: int  # of a line of metadata
    folder: str = ""  # of the views, below a model's
    with_cameras: bool = True


_R2N2: Final = _Renders("3D-R2N2", 24, 5)
_DISN: Final = _Renders("DISN", 36, 10)


class CrossPointPairs:
    """`data/ShapeNet/<synset>/<model>.ply` and `data/ShapeNetRendering/<synset>/<model>/rendering/00.png`."""

    FORMAT: ClassVar[str] = "crosspoint_pairs"
    LOOKS_LIKE: ClassVar[str] = (
        f"a folder with {_CLOUDS}/<synset>/<model>.ply and {_RENDERS}/<synset>/<model>/rendering/*.png (variants "
        f"{', '.join(_VARIANTS)})"
    )

    def __init__(self, url: str, listing: Listing, renders: _Renders, renders_root: str) -> None:
        self.url = url
        self.listing = listing
        self._renders = renders
        self._renders_root = renders_root
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether clouds and renders lie side by side."""
        return any({_CLOUDS, _RENDERS} <= set(files.entries(base.rstrip("/"))) for base in _BASES)

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The clouds, in the order of synset and model, all of them for training."""
        base = next((base for base in _BASES if files.exists(base + _CLOUDS)), None)
        if base is None:
            raise SourceError(f"{files.where(_CLOUDS)} is missing: the clouds lie there, as <synset>/<model>.ply")
        clouds = files.walk([".ply"], base + _CLOUDS)
        require_count(f"clouds in {base}{_CLOUDS}", len(clouds), _NUM_SHAPES, options)
        if not clouds:
            raise SourceError(
                f"{files.where(base + _CLOUDS)} holds no .ply: the clouds lie there as <synset>/<model>.ply"
            )
        places = [cloud.path for cloud in clouds]
        if astray := [place for place in places if place.removeprefix(base).count("/") != 2]:
            raise SourceError(f"{files.where(astray[0])} is out of place: clouds lie at {_CLOUDS}/<synset>/<model>.ply")
        ids = [place.removeprefix(f"{base}{_CLOUDS}/")[: -len(".ply")] for place in places]

        renders_root = base + _RENDERS
        if "image" in files.entries(renders_root):  # as DISN's archives unpack: albedo, depth and normal lie beside it
            renders_root += "/image"
        renders = _find_renders(files, [f"{renders_root}/{shape_id}" for shape_id in ids], options.variant)
        view_paths = (
            path
            for shape_id in islice(ids, _MODELS_LOOKED_AT)
            for path in _view_paths(f"{renders_root}/{shape_id}", renders)[:1]
        )
        header = _first_header(files, places)
        synsets = sorted({shape_id.partition("/")[0] for shape_id in ids})
        label_of = {synset: label for label, synset in enumerate(synsets)}
        listing = Listing(
            shapes=[
                ShapeReference(shape_id, label_of[shape_id.partition("/")[0]], "train", place)
                for shape_id, place in zip(ids, places, strict=True)
            ],
            class_names=tuple(CATEGORY_OF_SYNSET.get(synset, synset) for synset in synsets),
            splits=("train",),
            geometry="points",
            num_points=header.num_vertices,
            with_normals=header.has_normals,
            coloured=header.has_colours,
            images=SourceImages(
                renders.num_views, first_image_size(files, view_paths), with_cameras=renders.with_cameras
            ),
            licence=SHAPENET_LICENCE,
            content=" ".join([renders.name, renders.folder, *(str(cloud.size) for cloud in clouds)]),
        )
        return cls(files.url, listing, renders, renders_root)

    def load(self, shape: ShapeReference) -> Shape:
        """One cloud, and all renders of it with their cameras."""
        files = self._files
        images = self.listing.images
        assert images is not None, "open always sets them"
        cloud = self._cloud(files, shape.place)
        folder = f"{self._renders_root}/{shape.id}"
        cameras = self._cameras(files, folder) if images.with_cameras else None
        views = read_views(files, _view_paths(folder, self._renders), images.image_size)
        return Shape(cloud, Images(views, cameras=cameras))

    def _cloud(self, files: SourceFiles, path: str) -> PointCloud:
        cloud = read_ply_cloud(read_shape_file(files, path), files.where(path))
        if len(cloud.points) != self.listing.num_points:
            raise ShapeError(
                f"{files.where(path)} has {len(cloud.points):,} points, and the first cloud has "
                f"{self.listing.num_points:,}"
            )
        if self.listing.with_normals and cloud.normals is None:
            raise ShapeError(f"{files.where(path)} has no normals, and the first cloud has")
        if self.listing.coloured and cloud.colours is None:
            raise ShapeError(f"{files.where(path)} has no colours, and the first cloud has")
        return cloud

    def _cameras(self, files: SourceFiles, model_folder: str) -> Float32[np.ndarray, "v 8"]:
        path = _join(model_folder, self._renders.folder, _METADATA)
        rows = _metadata(read_shape_file(files, path).decode("utf-8", "replace"), files.where(path))
        expected = (self._renders.num_views, self._renders.num_columns)
        if len(rows) != expected[0] or any(len(row) != expected[1] for row in rows):
            found = " or ".join(str(count) for count in sorted({len(row) for row in rows}))
            raise ShapeError(
                f"{files.where(path)} has {len(rows)} cameras of {found or 'no'} numbers; {self._renders.name} has "
                f"{expected[0]} of {expected[1]}"
            )
        return np.array([_camera(row) for row in rows], np.float32)


def _camera(row: Sequence[float]) -> list[float]:
    """The values of a camera as `shape.py` names them, from a line of either set."""
    azimuth, elevation, in_plane, ratio = row[:4]
    turned = (90.0 - azimuth) % 360.0
    if len(row) == _R2N2.num_columns:
        field_of_view = _field_of_view(_R2N2_FOCAL_LENGTH, _R2N2_SENSOR_SIZE)
        return [turned, elevation, in_plane, ratio * _R2N2_MAX_DISTANCE, field_of_view, math.nan, math.nan, math.nan]
    focal_length, sensor_size, max_distance, shift_x, shift_y, shift_z = row[4:]
    field_of_view = _field_of_view(focal_length, sensor_size)
    return [turned, elevation, in_plane, ratio * max_distance, field_of_view, shift_x, shift_z, -shift_y]


def _field_of_view(focal_length: float, sensor_size: float) -> float:
    return 2 * math.degrees(math.atan(sensor_size / 2 / focal_length))


def _metadata(text: str, where: str) -> list[list[float]]:
    """The numbers of each line, whether they stand in brackets with commas or bare. ShapeError where they are none."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise ShapeError(f"{where}, line {number}, is no camera: {error}") from error
        if not all(math.isfinite(value) for value in row) or (len(row) == _DISN.num_columns and row[4] <= 0):
            raise ShapeError(
                f"{where}, line {number}, is no camera: a value is not finite, or the focal length not above 0"
            )
        rows.append(row)
    return rows


def _find_renders(files: SourceFiles, model_folders: Sequence[str], variant: str | None) -> _Renders:
    """Which set of renders this is, and where in a model's folder its views lie: the first models that have any tell."""
    for model_folder in islice(model_folders, _MODELS_LOOKED_AT):
        for folder in _view_folders(files, model_folder, variant):
            names = files.entries(_join(model_folder, folder))
            found = _told_apart(files, _join(model_folder, folder), names)
            if found is not None:
                if variant is not None and folder.rpartition("/")[2] != variant:
                    raise AskedWrongly(
                        f"The renders in {files.where(model_folder)} come in one variant ({found.name}), not in "
                        f"{' and '.join(_VARIANTS)} ones: leave out --variant {variant}."
                    )
                return _Renders(found.name, found.num_views, found.num_columns, folder, _METADATA in names)
    raise SourceError(
        f"{files.where(model_folders[0])} and the folders of the models after it hold no renders: they lie there in "
        f"rendering/, or in easy/ and hard/, as 00.png and so on with {_METADATA}; {_R2N2.name} has "
        f"{_R2N2.num_views} of them, {_DISN.name} {_DISN.num_views}"
    )


def _view_folders(files: SourceFiles, model_folder: str, variant: str | None) -> Iterator[str]:
    """Where the views of one model may lie below its folder. SourceError where only another variant is there."""
    if variant is not None and variant not in _VARIANTS:
        raise AskedWrongly(f"Variants of these renders are {' and '.join(_VARIANTS)}, not {variant!r}.")
    wanted = variant or _VARIANTS[0]
    for folder in ("rendering", ""):
        there = set(files.entries(_join(model_folder, folder)))
        if wanted in there:
            yield _join(folder, wanted)
        elif others := there & set(_VARIANTS):
            raise SourceError(
                f"{files.where(_join(model_folder, folder))} has no {wanted} renders: fetch them, or say --variant "
                f"{others.pop()}"
            )
        else:
            yield folder


def _told_apart(files: SourceFiles, folder: str, names: Sequence[str]) -> _Renders | None:
    """Which set the renders in a folder are of; None where it does not tell."""
    if _METADATA in names:
        path = f"{folder}/{_METADATA}"
        try:
            rows = _metadata(files.read(path).decode("utf-8", "replace"), files.where(path))
        except ShapeError:
            return None  # said when that shape is read
        return next((renders for renders in (_R2N2, _DISN) if rows and len(rows[0]) == renders.num_columns), None)
    num_images = sum(name[:-4].isdecimal() and name.endswith(".png") for name in names)
    return next((renders for renders in (_R2N2, _DISN) if num_images == renders.num_views), None)


def _view_paths(model_folder: str, renders: _Renders) -> list[str]:
    """The views in their order; others in the same folder, such as 00_depth.png, are none."""
    return [_join(model_folder, renders.folder, f"{view:02d}.png") for view in range(renders.num_views)]


def _first_header(files: SourceFiles, places: Sequence[str]) -> PlyHeader:
    """The header of the first cloud that has one; all others have to agree."""
    for place in islice(places, _MODELS_LOOKED_AT):
        try:
            return read_ply_header(files.read(place), files.where(place))
        except ShapeError:
            continue  # said when that shape is read
    raise SourceError(f"{files.where(places[0])} and the clouds after it are no PLY files: fetch them again")


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
