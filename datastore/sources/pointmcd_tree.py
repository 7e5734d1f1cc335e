"""PointMCD's trees: clouds, views, and which points each view sees, for ModelNet40 and for ShapeNetPart.

Row k of a visibility file is point k of the cloud, column v is view v. ModelNet40's views are numbered 01 to 12;
ShapeNetPart's carry two indices, of elevation (1 and 2, outer) and of azimuth (1 to 8, inner).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

import numpy as np
from jaxtyping import Bool

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import Images, PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, SourceImages, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from datastore.sources.shape_file import as_points, read_numbers
from datastore.sources.shapenet_names import PART_NAMES, checked_parts

_CLASS_LIST: Final = "class_list.txt"
_SPLITS: Final = ("train", "test")
_SUFFIX_OF_NAME: Final = 5  # a shape's name is its class, an underscore and four digits
_SHAPES_LOOKED_AT: Final = 64


@dataclass(frozen=True)
class _Tree:
    """One of the trees: its folders, and how its files are written."""

    variant: str  # also the folder that it usually lies in
    clouds: str
    cloud_suffix: str
    num_points: int
    num_columns: int
    separator: str | None
    views: str
    view_suffixes: tuple[str, ...]
    visibility: str
    num_classes: int
    num_shapes: dict[str, int]
    with_parts: bool = False


_TREES: Final = (
    _Tree(
        variant="ModelNet40",
        clouds="point_cloud_1024",
        cloud_suffix=".xyz",
        num_points=1024,
        num_columns=3,
        separator=None,
        views="mv_image_12",
        view_suffixes=tuple(f"_{view:02d}.jpg" for view in range(1, 13)),
        visibility="mv_visibility_1024x12",
        num_classes=40,
        num_shapes={"train": 9_843, "test": 2_468},
    ),
    _Tree(
        variant="ShapeNetPart",
        clouds="point_cloud_labeled_2048",
        cloud_suffix=".txt",
        num_points=2048,
        num_columns=4,
        separator=";",
        views="mv_image_16",
        view_suffixes=tuple(f"_{elevation}_{azimuth}.jpg" for elevation in (1, 2) for azimuth in range(1, 9)),
        visibility="mv_visibility_2048x16",
        num_classes=16,
        num_shapes={"train": 14_007, "test": 2_874},
        with_parts=True,
    ),
)
_IMAGES_ALONE: Final = "mv_image_16"  # all that the ShapeNetCore tree has


@dataclass(frozen=True)
class _Layout:
    """Where in a folder a shape's files lie: below a folder of its class, or all side by side."""

    by_class: bool
    suffix: str

    def path(self, folder: str, class_name: str, name: str) -> str:
        """A file's path, or the beginning of it where the suffix is yet to come."""
        below = f"{class_name}/{name}" if self.by_class else name
        return f"{folder}/{below}{self.suffix}"


class PointMcdTree:
    """`class_list.txt`, `train_list.txt`, `test_list.txt` and a folder each of clouds, views and visibility."""

    FORMAT: ClassVar[str] = "pointmcd"
    LOOKS_LIKE: ClassVar[str] = (
        "a folder with class_list.txt, train_list.txt, test_list.txt and point_cloud_1024, mv_image_12, "
        "mv_visibility_1024x12 (or ShapeNetPart's point_cloud_labeled_2048 and so on)"
    )

    def __init__(self, url: str, listing: Listing, tree: _Tree, base: str, views: _Layout, visibility: _Layout) -> None:
        self.url = url
        self.listing = listing
        self._tree = tree
        self._base = base
        self._views = views
        self._visibility = visibility
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether one of the trees' folders of clouds is there, or of images in ShapeNetCore's."""
        return bool(_find_trees(files)) or _has_images_alone(files)

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The shapes in the order of the lists, training ones first."""
        tree, base = _chosen_tree(files, options.variant)
        class_names = tuple(files.lines(base + _CLASS_LIST))
        if len(set(class_names)) != tree.num_classes or len(class_names) != tree.num_classes:
            raise SourceError(
                f"{files.where(base + _CLASS_LIST)} names {len(set(class_names))} classes in {len(class_names)} lines, "
                f"and {tree.variant} has {tree.num_classes}: fetch it again"
            )
        for folder in (tree.views, tree.visibility):
            if not files.exists(base + folder):
                raise SourceError(f"{files.where(base + folder)} is missing: fetch it, or render the clouds' own views")
        found = files.walk([tree.cloud_suffix], base + tree.clouds)
        places = {PurePosixPath(file.path).stem: file.path for file in found}
        sizes = {file.path: file.size for file in found}
        label_of = {name: label for label, name in enumerate(class_names)}
        shapes = []
        for split in _SPLITS:
            for name in _read_list(files, base, tree, split, places, options):
                class_name = name[:-_SUFFIX_OF_NAME]
                if class_name not in label_of:
                    raise SourceError(
                        f"{files.where(f'{base}{split}_list.txt')}: {name!r} is of class {class_name!r}, which "
                        f"{_CLASS_LIST} does not name. Take all lists from the same place"
                    )
                shapes.append(ShapeReference(name, label_of[class_name], split, places[name]))
        if not shapes:
            raise SourceError(f"{files.where(base + tree.clouds)} holds none of the clouds that the lists name")
        views = _layout(files, base + tree.views, shapes, tree.view_suffixes[:1], "views")
        visibility = _layout(files, base + tree.visibility, shapes, ("_mvv.xyz", "_mvv.txt"), "visibility")
        first_images = (
            views.path(base + tree.views, shape.id[:-_SUFFIX_OF_NAME], shape.id)
            for shape in islice(shapes, _SHAPES_LOOKED_AT)
        )
        listing = Listing(
            shapes=shapes,
            class_names=class_names,
            splits=_SPLITS,
            geometry="points",
            num_points=tree.num_points,
            part_names=PART_NAMES if tree.with_parts else (),
            images=SourceImages(len(tree.view_suffixes), first_image_size(files, first_images), with_visibility=True),
            content=" ".join(str(sizes[shape.place]) for shape in shapes),
        )
        return cls(files.url, listing, tree, base, views, visibility)

    def load(self, shape: ShapeReference) -> Shape:
        """One cloud, its views, and which of its points each view sees."""
        files = self._files
        tree, images = self._tree, self.listing.images
        assert images is not None, "open always sets them"
        class_name = shape.id[:-_SUFFIX_OF_NAME]
        table = self._read_table(files, shape.place, tree.num_columns, tree.separator)
        cloud = PointCloud(as_points(table[:, :3], files.where(shape.place)))
        if tree.with_parts:
            # parts are counted through the categories in the order of their names, whatever the order of the list
            category = sorted(self.listing.class_names, key=str.lower).index(class_name)
            parts = checked_parts(table[:, 3], category, files.where(shape.place))
            cloud = PointCloud(cloud.points, part_labels=parts)
        visibility = self._read_visibility(files, class_name, shape.id)
        first = self._views.path(self._base + tree.views, class_name, shape.id).removesuffix(tree.view_suffixes[0])
        views = read_views(files, [first + suffix for suffix in tree.view_suffixes], images.image_size)
        return Shape(cloud, Images(views, visibility=visibility))

    def _read_visibility(self, files: SourceFiles, class_name: str, name: str) -> Bool[np.ndarray, "n v"]:
        tree = self._tree
        path = self._visibility.path(self._base + tree.visibility, class_name, name)
        table = self._read_table(files, path, len(tree.view_suffixes))
        if not np.isin(table, (0, 1)).all():
            raise ShapeError(f"{files.where(path)}: visibility is 0 or 1, and other numbers are there too")
        seen: Bool[np.ndarray, "n v"] = table == 1
        return seen

    def _read_table(self, files: SourceFiles, path: str, num_columns: int, separator: str | None = None) -> np.ndarray:
        table = read_numbers(files, path, separator)
        if table.shape != (self._tree.num_points, num_columns):
            raise ShapeError(
                f"{files.where(path)} has {len(table):,} rows of {table.shape[1]} numbers instead of "
                f"{self._tree.num_points:,} of {num_columns}; fetch it again"
            )
        return table


def _find_trees(files: SourceFiles) -> list[tuple[_Tree, str]]:
    """The trees at the URL: the folder itself is one, or the folders in it are named for them."""
    there = set(files.entries())
    found = [(tree, "") for tree in _TREES if tree.clouds in there]
    return found or [
        (tree, f"{tree.variant}/")
        for tree in _TREES
        if tree.variant in there and tree.clouds in files.entries(tree.variant)
    ]


def _has_images_alone(files: SourceFiles) -> bool:
    return _IMAGES_ALONE in files.entries() and not _find_trees(files)


def _chosen_tree(files: SourceFiles, variant: str | None) -> tuple[_Tree, str]:
    found = _find_trees(files)
    if not found:
        if _has_images_alone(files):
            raise SourceError(
                f"{files.where(_IMAGES_ALONE)}: there are views, but no clouds, and a store has points for every shape. "
                f"PointMCD published none for ShapeNetCore: ingest its meshes with --rig ring16 instead"
            )
        folders = " or ".join(tree.clouds for tree in _TREES)
        raise SourceError(f"{files.where('')} has no folder {folders}: the clouds lie there")
    chosen = [(tree, base) for tree, base in found if variant in (None, tree.variant)]
    variants = " and ".join(tree.variant for tree, _ in found)
    if not chosen:
        raise AskedWrongly(f"{files.where('')} holds {variants}, not {variant!r}.")
    if len(chosen) > 1:
        raise AskedWrongly(f"{files.where('')} holds {variants}: say which with --variant.")
    return chosen[0]


def _read_list(
    files: SourceFiles, base: str, tree: _Tree, split: str, there: dict[str, str], options: ReadingOptions
) -> list[str]:
    """The names of one split, checked against the clouds that are there."""
    place = f"{base}{split}_list.txt"
    # with or without the folder of the class and the suffix: what is between them is the name
    names = [PurePosixPath(line).name.removesuffix(tree.cloud_suffix) for line in files.lines(place)]
    absent = [name for name in names if name not in there]
    if absent and not options.partial:
        raise SourceError(
            f"{files.where(place)} names {len(absent):,} shapes that are not in {base}{tree.clouds}, {absent[0]} first. "
            f"Fetch them, or say --partial to take what is there"
        )
    require_count(files.where(place), len(names), tree.num_shapes[split], options)
    return [name for name in names if name in there]


def _layout(
    files: SourceFiles, folder: str, shapes: Sequence[ShapeReference], suffixes: Sequence[str], what: str
) -> _Layout:
    """How the files of a folder are named: as those of the first shapes that have any."""
    layouts = [_Layout(by_class, suffix) for by_class in (True, False) for suffix in suffixes]
    for shape in islice(shapes, _SHAPES_LOOKED_AT):
        for layout in layouts:
            if files.exists(layout.path(folder, shape.id[:-_SUFFIX_OF_NAME], shape.id)):
                return layout
    expected = layouts[0].path(folder, shapes[0].id[:-_SUFFIX_OF_NAME], shapes[0].id)
    raise SourceError(f"{files.where(expected)} is missing, and so are the {what} of the shapes after it: fetch them")
