"""Tests of models/image_models/projected_views.py."""

import pytest
import torch
from torch import Tensor

from models.depth_projection import depth_sums, frame_clouds, grey_images, pixels_of
from models.image_models import build_image_model
from models.image_models.projected_views import IMAGENET_MEAN, IMAGENET_STD, ProjectedViews, ProjectedViewsConfig
from models.image_models.trunk import TrunkConfig
from models.unit_sphere import to_unit_sphere

TINY = TrunkConfig(name="test_vit", image_size=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)
FIELDS = ("view_tokens", "view_saliency", "view_pixels")


def teacher(**settings: int | None) -> ProjectedViews:
    torch.manual_seed(0)
    return (
        ProjectedViewsConfig.model_validate({"trunk": TINY, "projection": 24, "num_drawn": None, **settings})
        .build()
        .eval()
    )


def clouds(num_clouds: int = 2, num_points: int = 40) -> Tensor:
    return torch.randn(num_clouds, num_points, 3, generator=torch.Generator().manual_seed(1)) * 0.4


def test_the_published_teacher_is_clip_s_image_tower_and_nothing_more() -> None:
    with torch.device("meta"):
        network = ProjectedViewsConfig().build()
    assert sum(parameter.numel() for parameter in network.parameters()) == 86_192_640
    assert network.num_features == 512 and network.image_size == 224
    assert network.mean.shape == network.std.shape == (3, 1, 1)
    assert (ProjectedViewsConfig().trunk.mean, ProjectedViewsConfig().trunk.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_it_looks_at_three_images_of_the_cloud_as_it_is() -> None:
    network, points = teacher(), clouds()
    with torch.no_grad():
        words = network.look(points)
        frame = frame_clouds(points, 64)
        images = grey_images(depth_sums(points, frame), network.mean, network.std)
        for view in range(3):
            tokens, saliency = network.tower.tokens_and_saliency(images[:, view])
            torch.testing.assert_close(words.tokens[:, view], tokens)
            torch.testing.assert_close(words.saliency[:, view], saliency)
    assert words.tokens.shape == (2, 3, 16, 24) and torch.equal(words.pixels, pixels_of(points, frame))
    assert (words.saliency > 0).all() and (words.saliency.sum(dim=2) < 1).all()


def test_for_a_store_it_looks_at_the_cloud_in_the_unit_sphere() -> None:
    network, points = teacher(), clouds() + 2
    with torch.no_grad():
        taught, words = network.teach(points, FIELDS), network.look(to_unit_sphere(points))
    assert set(taught) == set(FIELDS) and taught["view_pixels"].dtype == torch.int16
    torch.testing.assert_close(taught["view_tokens"], words.tokens)
    torch.testing.assert_close(taught["view_saliency"], words.saliency)
    assert torch.equal(taught["view_pixels"].long(), words.pixels)


def test_images_for_a_store_are_drawn_from_as_many_points_as_in_training_and_all_points_have_pixels() -> None:
    network, points = teacher(num_drawn=30), clouds()
    with torch.no_grad():
        taught, of_drawn = network.teach(points, FIELDS), network.teach(points[:, :30], FIELDS)
    torch.testing.assert_close(taught["view_tokens"], of_drawn["view_tokens"])
    assert taught["view_pixels"].shape == (2, 40, 3, 2)
    assert torch.equal(taught["view_pixels"][:, :30], of_drawn["view_pixels"])
    assert (taught["view_pixels"] >= 0).all() and (taught["view_pixels"] < 64).all()


def test_only_what_is_asked_for_is_said() -> None:
    network, points = teacher(), clouds()
    assert set(network.teach(points, ("view_pixels",))) == {"view_pixels"}
    assert network.teach(points, ("view_features",))["view_features"].shape == (2, 3, 24)
    sizes = network.field_sizes(3)
    assert sizes["view_tokens"] == (3, 16, 24) and sizes["view_saliency"] == (3, 16)


def test_a_classifier_trains_what_is_said_of_patches_and_of_images() -> None:
    network = teacher(num_classes=5).train()
    logits = network(clouds())
    assert logits.shape == (2, 3, 5)
    logits.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_network_without_attention_of_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no class token"):
        ProjectedViewsConfig(trunk=TrunkConfig(name="test_resnet", image_size=64), projection=None).build()


def test_its_config_builds_it_again() -> None:
    network = teacher(num_classes=5)
    twin = build_image_model(network.config.model_dump(mode="json"))
    assert isinstance(twin, ProjectedViews)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin.eval().teach(clouds(), FIELDS[:1]), network.teach(clouds(), FIELDS[:1]))
