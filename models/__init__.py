"""Plain torch networks and operations, each with its config; nothing here knows of stores, runs or ranks.

`models.build_student({"kind": "pointnet"})` is a student with random weights; `models.load("exported/")` is what
`viewpoint export` wrote, ready for `.encode(points)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.exported import load
    from models.students import build_student

__all__ = ["build_student", "load"]


def __getattr__(name: str) -> Any:
    """The two names above, imported when first used: importing a part of this package does not pay for the rest."""
    if name == "build_student":
        from models.students import build_student

        return build_student
    if name == "load":
        from models.exported import load

        return load
    raise AttributeError(f"module 'models' has no attribute {name!r}")
