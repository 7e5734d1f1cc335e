"""What a teacher's `view_features` are to an objective: their width, and what several views say together."""

from jaxtyping import Float, Float32
from torch import Tensor

from datastore.errors import MissingField
from trainer.objectives.base import Corpus


def feature_width(teacher: str, corpus: Corpus, objective: str) -> int:
    """The width of a teacher's view features; an error that names the command which writes them where there are none."""
    if teacher not in corpus.teacher_dims:
        present = ", ".join(sorted(corpus.teacher_dims)) or "no teacher"
        raise MissingField(
            f"The store has no 'view_features' of teacher {teacher!r}, which objective {objective!r} reads; it has those "
            f"of {present}. Write them with `viewpoint cache STORE --teacher {teacher} --weights FOLDER`, where FOLDER is "
            f"the export of job {teacher!r}, or let `viewpoint launch ... --prepare` do both."
        )
    return corpus.teacher_dims[teacher]


def of_shape(view_features: Float[Tensor, "b v d"]) -> Float32[Tensor, "b d"]:
    """PointCMT's F_img: the maximum over a shape's views, whatever their order; a constant."""
    return view_features.detach().float().amax(dim=1)
