"""PointCMT and its generator's stage: ranks with unequal numbers of labels."""

import atexit
import shutil
import tempfile

import torch

from models.exported import save_exported
from models.point_generator import PointGeneratorConfig
from tests.trainer.objectives.cases.case import CLASSES, POINTS, SAMPLES, VIEWS, WIDTH, Case
from trainer.objectives.image_to_points import ImageToPointsBatch
from trainer.objectives.pointcmt import PointCMTBatch


def hard_batch() -> PointCMTBatch:
    random = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[1:3] = -1
    points = torch.randn(SAMPLES, POINTS, 3, generator=random)
    features = torch.rand(SAMPLES, VIEWS, WIDTH, generator=random)
    features[2] = 0  # an image network that has nothing to say: the generator puts all points in one place
    points[5] = 0.25  # and a shape that is one place
    return PointCMTBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, points, label, features)


def batch_without_views() -> PointCMTBatch:
    batch = hard_batch()
    return PointCMTBatch.without("view_features")(batch.ids, batch.seeds, batch.points, batch.label)


def generator_batch() -> ImageToPointsBatch:
    batch = hard_batch()
    assert batch.view_features is not None
    return ImageToPointsBatch(batch.ids, batch.seeds, batch.points, batch.view_features)


def exported_generator(width: int = WIDTH, num_points: int = 24) -> str:
    """The folder of a generator that is the same in every process."""
    folder = tempfile.mkdtemp(prefix="viewpoint-generator-")
    atexit.register(shutil.rmtree, folder)
    config = PointGeneratorConfig(in_features=width, num_points=num_points)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generator = config.build()
    described = {"kind": "point_generator", "point_generator": config.model_dump(mode="json")}
    save_exported(folder, described, generator, "", {})
    return folder


POINTCMT = {
    "kind": "pointcmt",
    "teacher": "teacher",
    "feature_width": WIDTH,
    "generator": exported_generator(),
    # not 30 and 9.6: what the tests allow gradients to differ by does not grow with them
    "feature_enhancement_weight": 1.0,
    "classifier_enhancement_weight": 1.0,
}
NO_FE, NO_CLE = {"feature_enhancement_weight": 0}, {"classifier_enhancement_weight": 0}
SUMMED = {"classifier_enhancement_weight": 0.3, "classifier_enhancement_reduction": "sum"}
GENERATOR = {
    "kind": "image_to_points",
    "teacher": "teacher",
    "generator": {"num_points": POINTS, "dropout": 0.0},
    "weight": 3.0,
}
CASES = {
    "pointcmt": Case(POINTCMT, hard_batch),
    "pointcmt, boxes as intended, matched exactly": Case(
        {**POINTCMT, "distance": {"box_normalisation": "intended", "matching": "exact"}}, hard_batch
    ),
    "pointcmt, feature enhancement alone": Case({**POINTCMT, **NO_CLE}, hard_batch),
    "pointcmt, classifier enhancement alone, summed and detached": Case(
        {**POINTCMT, **NO_FE, **SUMMED, "detach_target": True}, hard_batch
    ),
    "pointcmt, off": Case({"kind": "pointcmt", **NO_FE, **NO_CLE}, batch_without_views),
    "image_to_points": Case(GENERATOR, generator_batch),
    "image_to_points, hidden layers": Case(
        {**GENERATOR, "generator": {"num_points": POINTS, "hidden_widths": [32, 32], "dropout": 0.1}}, generator_batch
    ),
}
