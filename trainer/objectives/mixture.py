"""Mixture: one student trained by a weighted sum of objectives, each with its own augmentation, heads and terms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from datastore.batch import Batch
from datastore.schema import FIELDS
from models.encoding import PointEncoder
from trainer.objectives.base import Corpus, Objective, Terms

if TYPE_CHECKING:
    from trainer.objectives import SingleObjectiveConfig

PartName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class MixturePart(BaseModel, extra="forbid", frozen=True):
    """One objective of a mixture, and what each of its terms is multiplied by beyond its own weights."""

    weight: NonNegativeFloat = 1.0  # 0: the part is not built, and nothing is read for it
    # trainer/objectives/__init__.py defines that type: all objectives but the mixture itself
    objective: Annotated["SingleObjectiveConfig", Field(discriminator="kind")]


class MixtureConfig(BaseModel, extra="forbid", frozen=True):
    """Parts by name; a term `task` of part `labels` is logged as `labels/task`."""

    kind: Literal["mixture"] = "mixture"
    needs_student: ClassVar[bool] = True

    parts: dict[PartName, MixturePart] = Field(min_length=1)
    # Whose features the parts read; by default what the parts say. A run that started is bound to the teacher's weights here
    teacher: str | None = Field(default_factory=lambda earlier: _first_teacher(earlier.get("parts", {})))

    @property
    def built(self) -> Mapping[str, MixturePart]:
        """The parts that weigh something."""
        return {name: part for name, part in self.parts.items() if part.weight > 0}

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """What the store must hold of the teacher."""
        taught = [self.parts[name].objective for name, _ in _teachers(self.parts)]
        fields = [getattr(objective, "teacher_fields", ("view_features",)) for objective in taught]
        return tuple(dict.fromkeys(name for names in fields for name in names))

    @property
    def student_kinds(self) -> tuple[str, ...] | None:
        """The students that every part can train; None: any."""
        needed = [getattr(part.objective, "student_kinds", None) for part in self.parts.values()]
        chosen = [kinds for kinds in needed if kinds is not None]
        return tuple(kind for kind in chosen[0] if all(kind in kinds for kinds in chosen)) if chosen else None

    @model_validator(mode="after")
    def _parts_go_together(self) -> "MixtureConfig":
        if not self.built:
            raise ValueError("all parts weigh 0: nothing would be learned")
        for name, part in self.parts.items():
            if not part.objective.needs_student:
                raise ValueError(
                    f"part {name!r} is a {part.objective.kind}, which trains a network of its own: the parts of a "
                    f"mixture share one student"
                )
        teachers = {name: teacher.partition("@")[0] for name, teacher in _teachers(self.parts)}
        if len(set(teachers.values())) > 1:
            said = ", ".join(f"{name!r} reads {teacher}" for name, teacher in teachers.items())
            raise ValueError(f"the parts of a mixture read one teacher, but {said}: train with one of them")
        expected = next(iter(teachers.values()), None)
        if (self.teacher or "").partition("@")[0] != (expected or ""):
            raise ValueError(f"teacher is {self.teacher}, but the parts read {expected}: change it there")
        return self

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "Mixture":
        """The objectives around one student, sized for a corpus."""
        assert student is not None, "RunConfig checks needs_student"
        return Mixture(self, student, corpus)


class Mixture(Objective[Batch]):
    """Terms: those of all parts, as `part/term`, times the part's weight. The student runs once for each part."""

    def __init__(self, config: MixtureConfig, student: PointEncoder, corpus: Corpus) -> None:
        super().__init__()
        self.student = student  # first, so that its weights have the same names in every mixture
        self.weights = {name: part.weight for name, part in config.built.items()}
        parts: dict[str, Objective[Any]] = {}
        for name, part in config.built.items():
            objective = part.objective
            if getattr(objective, "teacher", None) is not None:
                objective = objective.model_copy(update={"teacher": config.teacher})
            parts[name] = objective.build(student, corpus)
        self.parts = nn.ModuleDict(parts)
        self.batch_type = union_of([part.batch_type for part in parts.values()])
        self.compares_samples = any(part.compares_samples for part in parts.values())

    @property
    def encoder(self) -> PointEncoder:
        """The student of all parts."""
        return self.student

    def forward(self, batch: Batch) -> Terms:
        terms: Terms = {}
        figures: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            assert isinstance(part, Objective)
            read = ("ids", "seeds", *part.batch_type.store_fields())
            of_part = part(part.batch_type(**{field: getattr(batch, field) for field in read}))
            terms |= {f"{name}/{term}": self.weights[name] * value for term, value in of_part.items()}
            figures |= {f"{name}/{figure}": value for figure, value in part.figures.items()}
        self.figures = figures
        return terms


def union_of(batch_types: Sequence[type[Batch]]) -> type[Batch]:
    """A batch with every store field that one of these reads; with some views of each shape where all want as many.

    Otherwise it has all views, and objectives that look at some draw them for themselves.
    """
    fields = {
        field.name: field.type
        for batch_type in batch_types
        for field in dataclasses.fields(batch_type)
        if field.name in batch_type.store_fields()
    }
    union: type[Batch] = dataclasses.make_dataclass("MixtureBatch", fields.items(), bases=(Batch,), frozen=True)
    drawn = {each.views_drawn for each in batch_types if any("v" in FIELDS[name].axes for name in each.store_fields())}
    number = drawn.pop() if len(drawn) == 1 else None
    return union if number is None else union.drawing(number)


def _teachers(parts: Mapping[str, MixturePart]) -> list[tuple[str, str]]:
    found = [(name, getattr(part.objective, "teacher", None)) for name, part in parts.items()]
    return [(name, teacher) for name, teacher in found if teacher is not None]


def _first_teacher(parts: Mapping[str, MixturePart]) -> str | None:
    return next((teacher for _, teacher in _teachers(parts)), None)
