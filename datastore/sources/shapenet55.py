"""ShapeNet-55: 8,192 points of each of 52,470 shapes, as Point-BERT's authors split them."""

import re
from collections.abc import Iterator
from typing import ClassVar, Final, Self

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import Images, PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, SourceImages, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from datastore.sources.shape_file import as_points, read_array
from datastore.sources.shapenet_names import CATEGORY_OF_SYNSET, SHAPENET_LICENCE

_CLOUDS: Final = "shapenet_pc"
_IMAGES: Final = "shapenet_img"  # of ReCon, whose lists leave out the shapes without one
_ULIP: Final = "rendered_images"  # another format keeps the same clouds beside these
_SPLITS: Final = ("train", "test")
_WHOLE: Final = "ShapeNet-55"
_LISTS_OF_WHOLE: Final = ("ShapeNet-55", "ShapeNet-35", "")  # the second is a slip of its README that people copied
_OTHER_LISTS: Final = re.compile(r"ShapeNet-(?!55$|35$).+")  # ShapeNet-34, ShapeNet-unseen21
_NUM_SHAPES: Final = {"train": 41_952, "test": 10_518}
_SHAPE: Final = (8_192, 3)
_LINE: Final = re.compile(r"(?P<synset>\d+)-(?P<model>.+)\.npy")  # models may have a `-` too: the first one splits
_SYNSETS: Final = tuple(CATEGORY_OF_SYNSET)
_IMAGES_TRIED: Final = 64


class ShapeNet55:
    """`shapenet_pc/<synset>-<model>.npy`, listed by `ShapeNet-55/{train,test}.txt` or by lists beside the clouds' folder."""

    FORMAT: ClassVar[str] = "shapenet55"
    LOOKS_LIKE: ClassVar[str] = (
        f"a folder with {_CLOUDS}/<synset>-<model>.npy and {_WHOLE}/train.txt, test.txt; {_IMAGES} where there are images"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether the folder of its clouds is there, and not the renders that make another format of it."""
        names = files.entries()
        return _CLOUDS in names and _ULIP not in names

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The shapes in the order of the lists, training ones first; labels in the order of the synsets."""
        variant, list_files = _chosen_lists(files, options)
        sizes = {file.path: file.size for file in files.walk([".npy"], _CLOUDS)}
        with_images = _IMAGES in files.entries()
        shapes: list[ShapeReference] = []
        for split, path in list_files.items():
            of_split = list(_listed(files, path, split))
            if variant == _WHOLE and not with_images:
                require_count(f"shapes in {files.where(path)}", len(of_split), _NUM_SHAPES[split], options)
            absent = [shape.place for shape in of_split if shape.place not in sizes]
            if absent and not options.partial:
                raise SourceError(
                    f"{files.where(absent[0])} is missing, and {path} lists it; {len(absent):,} such files. Fetch them, or say "
                    f"--partial to take what is there."
                )
            shapes += [shape for shape in of_split if shape.place in sizes]
        images = None
        if with_images:
            images = SourceImages(1, first_image_size(files, [_image(shape) for shape in shapes[:_IMAGES_TRIED]]))
        listing = Listing(
            shapes=shapes,
            class_names=tuple(CATEGORY_OF_SYNSET.values()),
            splits=tuple(list_files),
            geometry="points",
            num_points=_SHAPE[0],
            images=images,
            licence=SHAPENET_LICENCE,
            content=" ".join(str(sizes[shape.place]) for shape in shapes),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One cloud, and the image of it where the source has images."""
        files = self._files
        where = files.where(shape.place)
        points = read_array(files, shape.place)
        if points.shape != _SHAPE:
            raise ShapeError(f"{where} is {points.shape}, and clouds of ShapeNet-55 are {_SHAPE}: fetch it again")
        cloud = PointCloud(as_points(points, where))
        if self.listing.images is None:
            return Shape(cloud)
        return Shape(cloud, Images(read_views(files, [_image(shape)], self.listing.images.image_size)))


def _chosen_lists(files: SourceFiles, options: ReadingOptions) -> tuple[str, dict[str, str]]:
    """The variant, and the list of each of its splits."""
    others = [name for name in files.entries() if _OTHER_LISTS.fullmatch(name)]
    variant = options.variant or _WHOLE
    if variant not in (_WHOLE, *others):
        raise AskedWrongly(f"{files.url} has no variant {variant!r}; it has {', '.join([_WHOLE, *others])}.")
    for folder in _LISTS_OF_WHOLE if variant == _WHOLE else (variant,):
        paths = {split: f"{folder}/{split}.txt" if folder else f"{split}.txt" for split in _SPLITS}
        found = {split: path for split, path in paths.items() if files.exists(path)}
        # the unseen classes of ShapeNet-34 are for test alone
        if len(found) == len(paths) or (found and variant != _WHOLE):
            return variant, found
        if found:
            missing = next(path for split, path in paths.items() if split not in found)
            raise SourceError(f"{files.where(missing)} is missing, and its counterpart is there. {_WHERE_FROM}")
    raise SourceError(f"{files.where(f'{variant}/train.txt')} is missing: it lists the training shapes. {_WHERE_FROM}")


_WHERE_FROM: Final = (
    "The lists are not in the archive of the clouds: take the folder data/ShapeNet55-34/ShapeNet-55 from the Point-BERT repository "
    "and put it beside shapenet_pc."
)


def _listed(files: SourceFiles, path: str, split: str) -> Iterator[ShapeReference]:
    label_of = {synset: label for label, synset in enumerate(_SYNSETS)}
    for number, line in enumerate(files.lines(path), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise SourceError(
                f"{files.where(path)}, line {number}: {line!r} is no <synset>-<model>.npy. Fetch the list again."
            )
        if match["synset"] not in label_of:
            raise SourceError(
                f"{files.where(path)}, line {number}: {line!r} is of synset {match['synset']}, which is none of ShapeNet's 55. "
                f"Fetch the list again."
            )
        yield ShapeReference(line.removesuffix(".npy"), label_of[match["synset"]], split, f"{_CLOUDS}/{line}")


def _image(shape: ShapeReference) -> str:
    return f"{_IMAGES}/{shape.id}.png"
