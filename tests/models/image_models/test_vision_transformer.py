"""Tests of what networks say of the parts of an image."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.image_models.trunk import TrunkConfig
from models.image_models.vision_transformer import TokenTrunk, TokenTrunkConfig

SIDE = 10  # test_vit makes 16-pixel patches of 160 pixels


def build(name: str = "test_vit", image_size: int = 160, weights: str | None = None, **changes: Any) -> TokenTrunk:
    torch.manual_seed(0)
    trunk = TrunkConfig(name=name, image_size=image_size, weights=weights)
    return TokenTrunkConfig(trunk=trunk, **changes).build().eval()


def images(r: int = 2, size: int = 160) -> Tensor:
    return torch.rand(r, 3, size, size, generator=torch.Generator().manual_seed(0))


def views(b: int = 2, v: int = 3, size: int = 160) -> Tensor:
    return torch.randint(0, 256, (b, v, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_clip_s_image_tower_has_the_published_size() -> None:
    with torch.device("meta"):
        trunk = timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", num_classes=512)
    assert (
        sum(each.numel() for each in trunk.parameters()) == 86_192_640 + 512
    )  # timm gives the projection a bias of zeros


@pytest.mark.slow
def test_the_clip_teacher_has_the_published_size_and_shapes() -> None:
    teacher = build("vit_base_patch16_clip_quickgelu_224.openai", 224, projection=512)
    assert sum(each.numel() for each in teacher.parameters()) == 86_192_640
    assert teacher.field_sizes(3) == {
        "view_features": (3, 512),
        "view_tokens": (3, 196, 512),
        "view_saliency": (3, 196),
    }


def reference(teacher: TokenTrunk, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features, tokens and saliency, block by block and without fused kernels."""
    trunk: Any = teacher.trunk
    x = trunk.patch_embed(pixels).flatten(1, -2)
    x = torch.cat([trunk.cls_token.expand(len(x), -1, -1), x], dim=1) + trunk.pos_embed
    x = trunk.norm_pre(x)
    for block in trunk.blocks:
        inner = block.norm1(x)
        heads, width = block.attn.num_heads, block.attn.head_dim
        query, key, value = block.attn.qkv(inner).view(*inner.shape[:2], 3, heads, width).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) / width**0.5).softmax(dim=-1)
        x = x + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    x = trunk.norm(x)
    projection = trunk.head if isinstance(trunk.head, nn.Linear) else nn.Identity()
    return projection(x[:, 0]), projection(x[:, 1:]), attention.mean(dim=1)[:, 0, 1:]


@pytest.mark.parametrize("projection", [None, 24])
def test_everything_equals_the_formulas(projection: int | None) -> None:
    teacher = build(projection=projection)
    with torch.no_grad():
        words = teacher(images())
        features, tokens, saliency = reference(teacher, images())
        torch.testing.assert_close(words.features, features)
        torch.testing.assert_close(words.tokens, tokens)
        torch.testing.assert_close(words.saliency, saliency)
        torch.testing.assert_close(teacher.tokens_and_saliency(images())[1], saliency)
    assert (saliency.sum(dim=1) < 1).all()


def test_watching_one_block_changes_nothing_of_what_a_network_says() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=0, img_size=160).eval()
    with torch.no_grad():
        torch.testing.assert_close(build()(images()).features, plain(images()))


def test_fields_of_views_have_the_sizes_that_are_promised() -> None:
    teacher = build(tokens=5)
    sizes = teacher.field_sizes(3)
    with torch.no_grad():
        said = teacher.teach(views(), tuple(sizes))
    assert {name: tuple(value.shape) for name, value in said.items()} == {
        name: (2, *size) for name, size in sizes.items()
    }
    assert sizes == {"view_features": (3, 64), "view_tokens": (3, 25, 64), "view_saliency": (3, 25)}
    assert list(teacher.teach(views(1, 1), ["view_saliency"])) == ["view_saliency"]


def test_coarser_tokens_are_averages_of_their_parts() -> None:
    with torch.no_grad():
        fine, coarse = build()(images()), build(tokens=5)(images())
        expected = F.interpolate(fine.tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE)), (5, 5), mode="area")
    torch.testing.assert_close(coarse.tokens, expected.flatten(2).transpose(1, 2))
    assert fine.saliency is not None and coarse.saliency is not None
    torch.testing.assert_close(coarse.saliency.sum(dim=1) * 4, fine.saliency.sum(dim=1))
    torch.testing.assert_close(coarse.features, fine.features)


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 10 x 10 tokens .* cannot be made 7 x 7\. Choose a divisor of 10"):
        build(tokens=7)(images())


def test_a_convolutional_network_s_tokens_are_its_last_map() -> None:
    teacher = build("test_resnet", 64)
    with torch.no_grad():
        words = teacher(images(size=64))
        last_map: Tensor = teacher.trunk.forward_features(images(size=64))  # type: ignore[operator]
    assert words.saliency is None
    torch.testing.assert_close(words.tokens, last_map.flatten(2).transpose(1, 2))
    torch.testing.assert_close(words.features, words.tokens.mean(dim=1))
    assert list(teacher.field_sizes(3)) == ["view_features", "view_tokens"]


@pytest.mark.parametrize("call", ["teach", "tokens_and_saliency"])
def test_saliency_of_a_network_without_a_class_token_is_refused(call: str) -> None:
    teacher = build("test_resnet", 64)
    with pytest.raises(ValueError, match=r"test_resnet has no class token .* Ask for view_features and view_tokens"):
        if call == "teach":
            teacher.teach(views(size=64), ["view_saliency"])
        else:
            teacher.tokens_and_saliency(images(size=64))


@pytest.mark.parametrize(
    ("name", "size", "tokens", "has_saliency"),
    [
        ("vit_tiny_r_s16_p8_224", 64, 4, True),  # a hybrid
        ("deit_tiny_distilled_patch16_224", 32, 4, True),  # two prefix tokens
        ("eva02_tiny_patch14_224", 28, 4, True),  # rotated positions
        ("test_vit4", 160, 100, False),  # no class token
        ("xcit_nano_12_p16_224", 32, 4, False),  # attends from channel to channel
    ],
)  # fmt: skip
def test_other_transformers_tell_patches_from_prefix_tokens(
    name: str, size: int, tokens: int, has_saliency: bool
) -> None:
    sizes = build(name, size).field_sizes(2)
    assert sizes["view_tokens"][:2] == (2, tokens)
    assert ("view_saliency" in sizes) == has_saliency


def test_threads_that_share_a_network_hear_their_own_attention() -> None:
    teacher = build()
    batch = images(8)
    with torch.no_grad():
        alone = [teacher.tokens_and_saliency(each[None])[1] for each in batch]

        def describe(image: Tensor) -> Tensor:
            with torch.no_grad():
                return teacher.tokens_and_saliency(image[None])[1]

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(describe, batch))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_asking_for_sizes_changes_no_statistics() -> None:
    teacher = build("test_resnet", 64).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.field_sizes(2)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("image_size", [160, 80])
def test_a_projection_and_positions_of_another_size_come_from_timm_s_file(tmp_path: Path, image_size: int) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("test_vit", num_classes=24, img_size=160).eval()
    with torch.no_grad():
        whole.head.bias.zero_()
    save_file(whole.state_dict(), tmp_path / "clip.safetensors")
    teacher = build(image_size=image_size, weights=str(tmp_path / "clip.safetensors"), projection=24)
    with torch.no_grad():
        words = teacher(images(size=image_size))
        assert words.tokens.shape == (2, (image_size // 16) ** 2, 24)
        if image_size == 160:
            torch.testing.assert_close(words.features, whole(images()))


def test_a_classifier_is_no_projection(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit", num_classes=24, img_size=160)
    nn.init.ones_(whole.head.bias)
    save_file(whole.state_dict(), tmp_path / "classes.safetensors")
    with pytest.raises(ValueError, match=r"classes\.safetensors ends in a layer with a bias \(head\.bias\)"):
        build(weights=str(tmp_path / "classes.safetensors"), projection=24)
    with pytest.raises(ValueError, match="does not end in one linear layer"):
        build("deit_tiny_distilled_patch16_224", 32, projection=24)
