"""The demo corpus as a source."""

from datastore.demo import CLASS_NAMES
from datastore.mesh import Mesh
from datastore.sources import open_source


def test_the_demo_corpus_lists_and_loads_its_shapes() -> None:
    source = open_source("demo://shapes?count=24&seed=3")
    assert (source.FORMAT, len(source.listing.shapes)) == ("demo", 24)
    assert source.listing.class_names == CLASS_NAMES
    assert source.listing.coloured
    mesh = source.load(source.listing.shapes[5]).geometry
    assert isinstance(mesh, Mesh)
    assert mesh.face_parts is not None
    parts = {source.listing.part_names[part] for part in mesh.face_parts}
    assert all(part.startswith(CLASS_NAMES[source.listing.shapes[5].label]) for part in parts)


def test_another_seed_is_another_list_and_the_same_url_the_same_one() -> None:
    hashes = [open_source(f"demo://shapes?count=24&seed={seed}").listing.hash for seed in (0, 1, 0)]
    assert hashes[0] == hashes[2] != hashes[1]
