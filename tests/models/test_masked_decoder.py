"""Tests of models/masked_decoder.py."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from models.masked_decoder import CoordinatesHead, FeaturesHead, MaskedDecoder, MaskedDecoderConfig, TokenPropagation
from models.students.masked_transformer import (
    MaskedTransformer,
    MaskedTransformerConfig,
    Scale,
    propagate_visibility,
)
from models.transformer import Block

SMALL = MaskedTransformerConfig(
    num_groups=(24, 12, 8),
    group_sizes=(6, 4, 4),
    widths=(8, 12, 16),
    embedding_widths=(6, 10),
    depths=(1, 1, 1),
    num_heads=2,
)
SMALL_DECODER = MaskedDecoderConfig(num_heads=2)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def networks() -> tuple[MaskedTransformer, MaskedDecoder]:
    torch.manual_seed(0)
    encoder = SMALL.build()
    return encoder, SMALL_DECODER.build(encoder)


def masked_clouds(encoder: MaskedTransformer, *counts: int) -> tuple[Tensor, tuple[Scale, ...], tuple[Tensor, ...]]:
    """Points, their scales, and visibility with as many visible coarsest tokens in each cloud."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(len(counts), 60, 3, generator=generator).to(next(encoder.parameters()).dtype)
    ranks = torch.rand(len(counts), 8, generator=generator).argsort(dim=1).argsort(dim=1)
    scales = encoder.group(points)
    return points, scales, propagate_visibility(scales, ranks < torch.tensor(counts)[:, None])


def interpolated_by_loops(features: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for target in targets:
        squared = (known - target).square().sum(dim=1)
        nearest = squared.argsort()[:3]
        weights = 1 / (squared[nearest] + 1e-8)
        rows.append((weights / weights.sum()) @ features[nearest])
    return torch.stack(rows)


def propagation_by_convolutions(layer: TokenPropagation, features: Tensor) -> Tensor:
    """In eval mode, on [g, c]."""

    def apply(layers: nn.Sequential, features: Tensor) -> Tensor:
        for each in layers:
            if isinstance(each, nn.Linear):
                features = F.conv1d(features, each.weight[..., None], each.bias)
            elif isinstance(each, nn.BatchNorm1d):
                features = F.batch_norm(features, each.running_mean, each.running_var, each.weight, each.bias)
            else:
                features = each(features)
        return features

    fused = apply(layer.fuse, features.T[None])
    return F.gelu(fused + apply(layer.residual, fused))[0].T


def test_the_pre_training_student_has_as_many_parameters_as_the_paper_s() -> None:
    encoder = MaskedTransformerConfig().build()
    decoder = MaskedDecoderConfig().build(encoder)
    coordinates, features = CoordinatesHead(decoder.width, 8), FeaturesHead(decoder.width, 8)
    assert num_parameters(decoder) == 2_591_616
    assert num_parameters(coordinates) == 4_632
    assert num_parameters(features) == 2_371_584
    total = sum(map(num_parameters, (encoder, decoder, coordinates, features)))
    assert total == 17_622_808
    assert total - num_parameters(features) == 15_251_224  # Point-M2AE


def test_names_with_token_in_them_are_the_mask_token_and_the_propagation() -> None:
    _, decoder = networks()
    named = {name for name, _ in decoder.named_parameters() if "token" in name}
    propagation = {f"token_propagations.{name}" for name, _ in decoder.token_propagations.named_parameters()}
    assert named == {"mask_token"} | propagation


def test_paths_are_dropped_in_the_last_block_alone() -> None:
    _, decoder = networks()
    assert [module.drop_path.rate for module in decoder.modules() if isinstance(module, Block)] == [0.0, 0.1]


def test_decoding_is_the_paper_s_formula_cloud_by_cloud() -> None:
    encoder, decoder = networks()
    encoder.double().eval(), decoder.double().eval()
    points, scales, visible = masked_clouds(encoder, 2, 5)
    tokens = encoder.encode_visible(points, scales, visible)
    decoded = decoder(tokens, scales, visible)
    assert decoded.shape == (2, 12, 12)
    propagation = decoder.token_propagations[0]
    assert isinstance(propagation, TokenPropagation)
    for b in range(2):
        seen = visible[-1][b]
        centres, finer = scales[2].centres[b], scales[1].centres[b]
        # Visible tokens, then mask tokens, with their places in the same order
        sequence = torch.cat([tokens[2][b][seen], decoder.mask_token.expand(int((~seen).sum()), -1)])
        places = torch.cat([centres[seen], centres[~seen]])
        coarse = decoder.stages[0](sequence[None], places[None])[0]
        between = interpolated_by_loops(coarse, places, finer)
        skip = torch.where(visible[1][b][:, None], tokens[1][b], 0)
        fused = propagation_by_convolutions(propagation, torch.cat([skip, between], dim=1))
        expected = decoder.norm(decoder.stages[1](fused[None], finer[None])[0])
        # Interpolation weights are float32, as all geometry
        torch.testing.assert_close(decoded[b], expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_reaches_every_parameter_of_encoder_decoder_and_heads() -> None:
    encoder, decoder = networks()
    points, scales, visible = masked_clouds(encoder, 2, 5)
    decoded = decoder(encoder.encode_visible(points, scales, visible), scales, visible)
    coordinates, features = CoordinatesHead(12, 4), FeaturesHead(12, 4, 6)
    places, seen = coordinates(decoded[~visible[1]]), features(decoded[visible[1]])
    assert places.shape[1:] == (4, 3) and seen.shape[1:] == (4, 6) and len(places) + len(seen) == 24
    ((places * torch.randn_like(places)).sum() + (seen * torch.randn_like(seen)).sum()).backward()
    for network in (encoder, decoder, coordinates, features):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            unread = network is encoder and name.startswith("norms.0")  # the decoder does not go down to this scale
            assert (parameter.grad.abs().sum() > 0) is not unread, name


def test_autocast_stays_near_and_checkpointing_changes_nothing() -> None:
    encoder, decoder = networks()
    points, scales, visible = masked_clouds(encoder, 2, 5)
    with torch.no_grad():
        tokens = encoder.eval().encode_visible(points, scales, visible)
        exact = decoder.eval()(tokens, scales, visible)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = decoder(encoder.encode_visible(points, scales, visible), scales, visible)
    assert (exact - rounded.float()).abs().mean() < 0.05
    twin = SMALL_DECODER.model_copy(update={"checkpoint_activations": True}).build(encoder).eval()
    twin.load_state_dict(decoder.state_dict())
    gradients = []
    for each in (decoder, twin):
        each(tokens, scales, visible).square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("values", [{"depth": 0}, {"drop_path": 1.5}, {"width": 2}])
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MaskedDecoderConfig.model_validate(values)
