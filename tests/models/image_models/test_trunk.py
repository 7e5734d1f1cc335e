"""Tests of image networks: trunks, weights, and what is built on them."""

import time
from pathlib import Path

import fsspec
import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.image_models.multi_view import MultiViewClassifier, MultiViewClassifierConfig
from models.image_models.pooled import PooledTrunkConfig
from models.image_models.trunk import TrunkConfig, build_trunk, read_weights

TRUNK = "test_resnet"
CONFIG = TrunkConfig(name=TRUNK, image_size=32)


def views(b: int = 2, v: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, v, size, size, 3), generator=generator, dtype=torch.uint8)


def classifier(config: TrunkConfig = CONFIG) -> MultiViewClassifier:
    torch.manual_seed(0)
    return MultiViewClassifierConfig(trunk=config, num_classes=5).build().eval()


def test_the_teacher_has_as_many_parameters_as_the_paper_s() -> None:
    trunk = TrunkConfig(name="mobilenetv2_100", image_size=224)
    teacher = MultiViewClassifierConfig(trunk=trunk, num_classes=40).build()
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 3_163_904
    assert teacher.classifier.bias is None


def test_descriptors_and_logits_follow_the_paper_s_formulas() -> None:
    teacher, images = classifier(), views()
    predictions = teacher(images)
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 255  # no mean and deviation: PointMCD does not normalise
    descriptors = teacher.to_descriptor(teacher.trunk(pixels)).view(2, 3, 512)
    torch.testing.assert_close(predictions.descriptors, descriptors)
    weight = teacher.classifier.weight
    torch.testing.assert_close(predictions.view_logits, descriptors @ weight.T)
    torch.testing.assert_close(predictions.global_logits, teacher.to_global(descriptors.amax(dim=1)) @ weight.T)
    torch.testing.assert_close(teacher.describe(images), descriptors)
    assert (descriptors >= 0).all() and descriptors.any()


def test_a_view_is_described_alike_whatever_stands_beside_it() -> None:
    teacher, images = classifier(), views()
    torch.testing.assert_close(teacher.describe(images[1:, 2:]), teacher.describe(images)[1:, 2:])


def test_the_order_of_views_does_not_change_the_shape_s_logits() -> None:
    teacher, images = classifier(), views()
    torch.testing.assert_close(teacher(images[:, [2, 0, 1]]).global_logits, teacher(images).global_logits)


def test_mean_and_deviation_are_applied_when_given() -> None:
    images = views()
    normalised = classifier(CONFIG.model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}))
    plain = classifier()
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(
        normalised.describe(images).flatten(0, 1), plain.to_descriptor(plain.trunk(pixels)), rtol=1e-4, atol=1e-5
    )
    assert "mean" not in normalised.state_dict()


def test_views_of_another_size_are_resized() -> None:
    teacher, large = classifier(), views(size=64)
    pixels = large.flatten(0, 1).permute(0, 3, 1, 2) / 255
    small = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher.describe(large).flatten(0, 1), teacher.to_descriptor(teacher.trunk(small)))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit", "lcnet_035"])
def test_any_timm_network_serves_as_trunk(name: str) -> None:
    """Among them one whose pooled features are wider than its last map, and one made for a single image size."""
    assert classifier(TrunkConfig(name=name, image_size=32)).describe(views()).shape == (2, 3, 512)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file_with_or_without_its_classifier(tmp_path: Path, suffix: str, wrapped: bool) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(TRUNK, num_classes=0 if wrapped else 7)
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{name}": value for name, value in state.items()}} if wrapped else state, path
        )
    trunk = build_trunk(CONFIG.model_copy(update={"weights": str(path)}))
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_weights_come_from_an_object_store(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = timm.create_model(TRUNK, num_classes=7).state_dict()
    for name in ("weights.safetensors", "weights.pth"):
        save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
        url = f"memory://hub/{name}"
        fsspec.filesystem("memory").put(str(tmp_path / name), url)
        trunk = build_trunk(CONFIG.model_copy(update={"weights": url}))
        assert all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())
    with pytest.raises(ValueError, match="There is no weights file memory://hub/absent"):
        read_weights("memory://hub/absent.pth")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the hub's client keeps files in; nothing listens where the hub is said to be."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    return tmp_path


def publish(hub: Path, state: dict[str, Tensor]) -> None:
    """Puts weights where the client looks for what it has fetched before."""
    repository = hub / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repository / "snapshots" / ("0" * 40) / "model.safetensors")


def test_weights_come_from_timm_s_hub(hub: Path) -> None:
    torch.manual_seed(1)
    state = timm.create_model(TRUNK).state_dict()
    publish(hub, state)
    trunk = build_trunk(CONFIG.model_copy(update={"weights": "hub"}))
    assert all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())


def test_a_hub_that_is_not_there_is_an_error_that_names_the_way_out(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"test_resnet cannot be had from its hub: .*`--weights FILE` of `viewpoint"):
        build_trunk(CONFIG.model_copy(update={"weights": "hub"}))


def test_offline_the_hub_is_not_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be had from its hub"):
        build_trunk(CONFIG.model_copy(update={"weights": "hub"}))


def test_weights_on_the_hub_that_do_not_fit_are_no_random_weights(hub: Path) -> None:
    publish(hub, {"stem.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"cannot be had from its hub: Error.* in loading state_dict"):
        build_trunk(CONFIG.model_copy(update={"weights": "hub"}))


def test_a_network_that_the_hub_does_not_have_is_no_random_one(hub: Path) -> None:
    with pytest.raises(ValueError, match="No pretrained weights exist for lcnet_035"):
        build_trunk(TrunkConfig(name="lcnet_035", image_size=32, weights="hub"))


def test_without_a_file_weights_are_random() -> None:
    torch.manual_seed(0)
    first = build_trunk(CONFIG)
    second = build_trunk(CONFIG)
    assert not torch.equal(first.conv1[0].weight, second.conv1[0].weight)  # type: ignore[index, union-attr]


def test_weights_of_another_network_are_refused_and_the_first_differences_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"stem.weight": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError, match=r"other\.safetensors does not hold weights of timm's test_resnet: it has no conv1"
    ):
        build_trunk(CONFIG.model_copy(update={"weights": str(path)}))


def test_weights_of_the_right_names_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in build_trunk(CONFIG).state_dict().items()}
    state["conv1.0.weight"] = torch.zeros(2, 3, 3, 3)
    path = tmp_path / "shapes.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=r"conv1\.0\.weight of shape \(2, 3, 3, 3\) instead of"):
        build_trunk(CONFIG.model_copy(update={"weights": str(path)}))


def test_a_pooled_trunk_says_of_each_view_what_timm_says_of_the_image() -> None:
    config = CONFIG.model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)})
    teacher, images = PooledTrunkConfig(trunk=config).build().eval(), views()
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 255
    normalised = (pixels - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    described = teacher.describe(images)
    torch.testing.assert_close(described, teacher.trunk(normalised).view(2, 3, -1))
    assert described.shape == (2, *teacher.field_sizes(3)["view_features"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights file .*absent\.pth"):
        read_weights(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(str(path))


def test_a_file_with_python_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "objects.pth"
    torch.save({"model": Path("anything")}, path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(str(path))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="no mapping of names to tensors"):
        read_weights(str(path))


def test_an_unknown_network_is_refused_with_names_like_it() -> None:
    with pytest.raises(ValueError, match=r"no model 'mobilenetv2_1000'.*mobilenetv2_"):
        build_trunk(TrunkConfig(name="mobilenetv2_1000", image_size=64))
