"""Tests of models/image_models/mvcnn.py. Numbers of properties are those of the specification, section 6."""

import pytest
import torch
from torch import Tensor

from models.image_models import build_image_model
from models.image_models.mvcnn import MVCNN, MVCNNConfig
from models.image_models.trunk import TrunkConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = TrunkConfig(name="test_resnet", image_size=32, mean=MEAN, std=STD)


def views(b: int = 2, v: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, v, 32, 32, 3), generator=generator, dtype=torch.uint8)


def classifier() -> MVCNN:
    torch.manual_seed(0)
    network = MVCNNConfig(trunk=CONFIG, num_classes=5).build()
    network(views(b=4, seed=1))  # statistics that are not those of a new network
    return network.eval()


def test_the_published_network_has_as_many_parameters_as_the_paper_s() -> None:
    network = MVCNNConfig(trunk=TrunkConfig(name="resnet18", image_size=224), num_classes=40).build()
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_197_032
    assert network.field_sizes(20) == {"view_features": (20, 512)}


def test_logits_come_from_the_maximum_over_the_views_features() -> None:
    network, images = classifier(), views()
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 255
    features = network.trunk((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).view(
        2, 3, -1
    )
    predictions = network(images)
    torch.testing.assert_close(network.describe(images), features)
    torch.testing.assert_close(predictions.descriptors, features)
    torch.testing.assert_close(predictions.global_logits, network.classifier(features.max(dim=1).values))
    assert predictions.view_logits is None
    assert (features >= 0).all() and features.any()


def test_views_may_come_in_any_order_and_more_than_once() -> None:  # property 8
    network, images = classifier(), views()
    expected = network(images).global_logits
    torch.testing.assert_close(network(images[:, [2, 0, 1]]).global_logits, expected)
    torch.testing.assert_close(network(images[:, [0, 1, 2, 1]]).global_logits, expected)


def test_a_shape_is_described_alike_in_any_batch() -> None:  # property 9
    network, images = classifier(), views(b=5)
    expected = network.describe(images)
    for order in ([4, 0, 2], [1], [3, 3, 2, 1, 0, 4]):
        torch.testing.assert_close(network.describe(images[order]), expected[order], rtol=1e-5, atol=1e-5)


def test_the_maximum_of_what_a_store_keeps_is_the_maximum_as_a_store_would_keep_it() -> None:
    features = classifier().describe(views())
    assert torch.equal(features.half().amax(dim=1), features.amax(dim=1).half())


def test_it_is_one_of_the_image_networks() -> None:
    network = build_image_model({"kind": "mvcnn", "trunk": {"name": "test_resnet", "image_size": 32}, "num_classes": 2})
    assert isinstance(network, MVCNN)
    with pytest.raises(ValueError, match="num_classes is not set"):
        MVCNNConfig(trunk=CONFIG).build()
