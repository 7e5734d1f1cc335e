"""PointMCD's image networks with attention: sizes as published, and what each part computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.image_models.attention_vgg import (
    AttentionVgg,
    ChannelAttention,
    SpatialAttention,
    ViewAutoencoder,
    ViewAutoencoderConfig,
    ViewSegmenter,
    ViewSegmenterConfig,
)


def trunk(size: int = 64, **settings: Any) -> dict[str, Any]:
    return {"name": "vgg11_bn", "image_size": size, **settings}


def autoencoder(width: float = 0.0625, **settings: Any) -> ViewAutoencoder:
    torch.manual_seed(0)
    return ViewAutoencoderConfig.model_validate({"trunk": trunk(**settings), "width": width}).build()


def segmenter(width: float = 0.0625) -> ViewSegmenter:
    torch.manual_seed(0)
    sizes = {"trunk": trunk(), "width": width, "num_categories": 4, "num_parts": 5}
    return ViewSegmenterConfig.model_validate(sizes).build()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_networks_have_as_many_parameters_as_the_paper_s() -> None:
    with torch.device("meta"):
        whole = ViewAutoencoderConfig.model_validate({"trunk": trunk(224)}).build()
        sizes = {"trunk": trunk(224), "num_categories": 16, "num_parts": 50}
        parts = ViewSegmenterConfig.model_validate(sizes).build()
    assert num_parameters(whole.trunk) == 9_357_204
    assert num_parameters(whole) == 16_783_540
    assert num_parameters(parts) == 16_796_500


def test_maps_have_the_published_strides_and_the_descriptor_is_the_mean_of_the_last() -> None:
    network = autoencoder(size=224).eval()
    views = torch.randint(0, 256, (1, 2, 224, 224, 3), dtype=torch.uint8)
    maps = network.trunk(network.images(views.flatten(0, 1)))
    assert [tuple(each.shape) for each in maps] == [(2, 8, 112, 112), (2, 16, 56, 56), (2, 32, 28, 28), (2, 32, 14, 14)]
    described = network.describe(views)
    torch.testing.assert_close(described[0], maps.fourth.mean(dim=(2, 3)))
    assert described.shape == (1, *network.field_sizes(2)["view_features"]) and (described >= 0).all()


def test_attention_raises_a_map_by_a_weight_between_one_and_two() -> None:
    torch.manual_seed(0)
    map_ = torch.rand(2, 6, 5, 5)
    spatial, channel = SpatialAttention(3), ChannelAttention(6, ratio=2)
    seen = torch.stack([map_.mean(dim=1), map_.amax(dim=1)], dim=1)
    by_place = torch.sigmoid(nn.functional.conv2d(seen, spatial.weigh.weight, padding=1))
    torch.testing.assert_close(spatial(map_), map_ * by_place + map_)
    first, second = (layer.weight for layer in (channel.weigh[0], channel.weigh[2]))
    hidden = [(pooled @ first.T).relu() @ second.T for pooled in (map_.mean(dim=(2, 3)), map_.amax(dim=(2, 3)))]  # type: ignore[operator, union-attr]
    torch.testing.assert_close(channel(map_), map_ * torch.sigmoid(hidden[0] + hidden[1])[:, :, None, None] + map_)


def test_images_come_back_in_their_size() -> None:
    network = autoencoder()
    images = torch.rand(2, 3, 64, 64)
    assert network(images).shape == images.shape


def test_every_pixel_gets_logits_of_each_part_and_the_background() -> None:
    network = segmenter().eval()
    images = torch.rand(3, 3, 64, 64)
    logits = network(images, torch.tensor([0, 3, -1]))
    assert logits.shape == (3, 6, 64, 64)
    assert not torch.equal(logits[:1], network(images[:1], torch.tensor([1]))), "the category is told"
    alone = network(images[2:], torch.tensor([-1]))
    torch.testing.assert_close(logits[2:], alone)


def test_the_convolutions_start_from_timm_s_weights(tmp_path: Path) -> None:
    whole = autoencoder(width=1.0, size=32).trunk
    state = {f"features.{name}": value + 1 for name, value in whole.features.state_dict().items()}
    save_file(state | {"head.fc.weight": torch.zeros(2, 2)}, tmp_path / "vgg.safetensors")
    loaded = autoencoder(width=1.0, size=32, weights=str(tmp_path / "vgg.safetensors")).trunk
    for name, value in loaded.features.state_dict().items():
        assert torch.equal(value, state[f"features.{name}"]), name
    with pytest.raises(ValueError, match=r"vgg\.safetensors does not hold weights of timm's vgg11_bn in these widths"):
        autoencoder(width=0.5, weights=str(tmp_path / "vgg.safetensors"))


def test_another_network_or_an_odd_size_is_refused() -> None:
    with pytest.raises(ValueError, match="timm's vgg11_bn, not 'resnet18'"):
        ViewAutoencoderConfig.model_validate({"trunk": {"name": "resnet18", "image_size": 64}}).build()
    with pytest.raises(ValueError, match="is 48, and must be a multiple of 32"):
        ViewAutoencoderConfig.model_validate({"trunk": trunk(48)}).build()
    with pytest.raises(ValueError, match="num_categories and num_parts"):
        ViewSegmenterConfig.model_validate({"trunk": trunk()}).build()


def test_the_trunks_of_both_networks_are_the_same() -> None:
    assert isinstance(autoencoder().trunk, AttentionVgg)
    segmenter().trunk.load_state_dict(autoencoder().trunk.state_dict())
