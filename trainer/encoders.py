"""Encoders by where they lie: a run folder, one of its checkpoints, or an exported folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datastore.errors import AskedWrongly, DoNotRetry
from datastore.layout import Store
from datastore.objects import ObjectFolder
from models.encoding import PointEncoder
from models.exported import CONFIG_FILE, ExportedEncoder, Network, build_described, load
from models.students import build_student
from trainer.checkpoint import load_weights, open_checkpoint
from trainer.config import RunConfig
from trainer.fetched import fetched
from trainer.runfolder import RunFolder, run_named, say_known_runs


@dataclass(frozen=True)
class FoundEncoder:
    """A network in eval mode and without gradients, and where it comes from."""

    encoder: Network
    url: str
    step: int | None  # of the checkpoint; None for random weights
    is_random: bool
    config: RunConfig | None = None  # None for an exported folder
    run: RunFolder | None = None
    description: Mapping[str, Any] | None = None  # model.json of an exported folder

    @property
    def config_hash(self) -> str | None:
        """Which training made it."""
        if self.config is not None:
            return self.config.hash()
        digest: str | None = self.training.get("config_hash")
        return digest

    @property
    def num_points(self) -> int | None:
        """How many points it was trained on; None: all that are stored."""
        return self.config.data.num_points if self.config is not None else self.training.get("num_points")

    @property
    def split(self) -> str | None:
        """The split that it was trained on."""
        return self.config.data.split if self.config is not None else self.training.get("split")

    @property
    def teacher(self) -> str | None:
        """The teacher that its objective named, if it had one."""
        if self.config is not None:
            return getattr(self.config.objective, "teacher", None)
        return self.training.get("teacher")

    def read_store(self, store: Store) -> bool:
        """Whether its training read this store."""
        url = self.config.data.store_url if self.config is not None else self.training.get("store_url")
        return url is not None and ObjectFolder(url).root == store.folder.root

    @property
    def training(self) -> Mapping[str, Any]:
        """What an exported folder says of its training."""
        training: Mapping[str, Any] = (self.description or {}).get("training", {})
        return training


def encoder_url(named: str) -> str:
    """The URL of an encoder that is named by a URL, by a path, or, as a run in ./runs, by its name."""
    run = None if "://" in named or Path(named).exists() else run_named(named)
    return named if run is None else run.url


def find_encoder(url: str, *, random_weights: bool = False) -> FoundEncoder:
    """The encoder at a URL; of a run the newest checkpoint, or on request the weights that training began with."""
    folder = ObjectFolder(url)
    if folder.exists("config.yaml"):
        return _from_run(RunFolder(url), f"{url.rstrip('/')}/checkpoints", random_weights)
    if folder.exists(CONFIG_FILE):
        return _from_export(url, random_weights)
    here = folder.root if folder.is_local else folder.url  # absolute: a relative URL may not show its parents
    run_url, middle, _ = f"{here}/".rpartition("/checkpoints/")
    if middle and ObjectFolder(run_url).exists("config.yaml"):
        return _from_run(RunFolder(run_url), here, random_weights)
    found = ", ".join(folder.names()[:5]) or "nothing"
    raise AskedWrongly(
        f"{url} is no run folder (it has no config.yaml), no checkpoint of a run (RUN/checkpoints/step-...), and no "
        f"exported folder (it has no {CONFIG_FILE}). There is {found}."
        + ("" if "/" in url else f" {say_known_runs(url)}")
    )


def initial_encoder(config: RunConfig) -> PointEncoder:
    """The student that a run begins with: the same seed gives the same weights, whatever is built after it."""
    assert config.student is not None, "asked of runs with a student only"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_student(config.student)


def trained_encoder(run: RunFolder, weights: Mapping[str, Tensor]) -> Network:
    """The encoder of an objective's state: what else the objective trained is left behind."""
    config = run.config()
    encoder = build_student(config.student) if config.student is not None else build_described(run.network())
    _load_by_suffix(encoder, weights)
    return encoder.eval().requires_grad_(False)


def _from_run(run: RunFolder, checkpoint_url: str, random_weights: bool) -> FoundEncoder:
    config = run.config()
    if random_weights:
        if config.student is None:
            raise AskedWrongly(
                f"{run.url} (job {config.job!r}) trains no student: --random-weights is for point encoders."
            )
        encoder = initial_encoder(config).eval().requires_grad_(False)
        return FoundEncoder(encoder, run.url, None, True, config, run)
    folder, manifest = open_checkpoint(checkpoint_url)
    url = f"{folder.url}/step-{manifest.step:08d}"
    return FoundEncoder(trained_encoder(run, load_weights(url)), url, manifest.step, False, config, run)


def _from_export(url: str, random_weights: bool) -> FoundEncoder:
    if random_weights:
        raise AskedWrongly(
            f"{url} is an exported folder, which does not say what its training began with: give --random-weights the "
            f"run folder."
        )
    try:
        with fetched(url) as path:
            exported = load(path)
    except ValueError as error:
        raise DoNotRetry(str(error)) from error
    if isinstance(exported, ExportedEncoder):
        step = exported.description.get("training", {}).get("step")
        return FoundEncoder(exported.network, url, step, False, description=exported.description)
    return FoundEncoder(exported, url, None, False, description={})


def _load_by_suffix(encoder: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the one part of a state dict whose names, less a common prefix, are the encoder's."""
    wanted = encoder.state_dict()
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")]
    fitting = [prefix for prefix in prefixes if all(f"{prefix}{name}" in weights for name in wanted)]
    if len(fitting) != 1:
        raise DoNotRetry(
            f"The checkpoint holds {len(fitting)} networks whose weights are named as the recipe's encoder's "
            f"({first}, ...), where exactly one is expected. Is config.yaml the one that the run was started with?"
        )
    encoder.load_state_dict({name: weights[f"{fitting[0]}{name}"] for name in wanted})
