"""The embedded demo corpus: procedural shapes with parts and colours, for a first run without any data set."""

from datastore.demo.corpus import (
    CLASS_NAMES,
    LICENCE,
    PART_NAMES,
    DemoSpec,
    demo_mesh,
    demo_shapes,
    parse_demo_url,
)

__all__ = ["CLASS_NAMES", "LICENCE", "PART_NAMES", "DemoSpec", "demo_mesh", "demo_shapes", "parse_demo_url"]
