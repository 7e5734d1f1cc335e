"""The embedded demo corpus as a source: nothing to fetch, every shape made on the spot."""

import hashlib
from typing import ClassVar, Self

from datastore.demo import CLASS_NAMES, LICENCE, PART_NAMES, demo_mesh, demo_shapes, parse_demo_url
from datastore.mesh import Mesh
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference
from datastore.sources.files import SourceFiles


class DemoSource:
    """`demo://shapes?count=640&seed=0`."""

    FORMAT: ClassVar[str] = "demo"
    LOOKS_LIKE: ClassVar[str] = "a URL demo://shapes?count=640&seed=0: procedural shapes with parts, made on the spot"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._spec = parse_demo_url(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether the URL says so itself."""
        return files.url.startswith("demo://")

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The corpus, listed. AskedWrongly where the URL asks for what it does not have."""
        spec = parse_demo_url(files.url)
        listing = Listing(
            shapes=[
                ShapeReference(shape_id, label, split, str(index))
                for index, (shape_id, label, split) in enumerate(demo_shapes(spec))
            ],
            class_names=CLASS_NAMES,
            splits=("train", "test"),
            part_names=PART_NAMES,
            coloured=True,
            units="none",
            licence=LICENCE,
            # a corpus made by another version of its generator is another corpus: the first shape of each class tells
            content=" ".join(_checksum(demo_mesh(spec, index)) for index in range(min(spec.count, len(spec.classes)))),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One shape of the corpus."""
        return Shape(demo_mesh(self._spec, int(shape.place)))


def _checksum(mesh: Mesh) -> str:
    return hashlib.sha256(mesh.vertices.tobytes() + mesh.faces.tobytes()).hexdigest()[:16]
