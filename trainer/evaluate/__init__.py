"""Stage: scores a frozen encoder under one protocol, and keeps the result with every setting that made it.

Honest by construction: protocols fit and choose on the training split alone, and each test shape is predicted once. The
record also counts what the two splits share, so that a report can show it instead of promising it.
"""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import BaseModel, model_validator

from datastore.errors import EXIT_DONE, AskedWrongly, DoNotRetry
from trainer.evaluate.linear_svm import PROTOCOLS, LinearSVM, fit, score

if TYPE_CHECKING:
    from datastore.layout import Store
    from trainer.encoders import FoundEncoder
    from trainer.evaluate.features import ShapeFeatures

HELP = "score an encoder under one protocol and keep the record"

TRAIN: Final = "train"
TEST: Final = "test"
RANDOM_WEIGHTS: Final = "random_weights"
"""What is added to the name of a record whose encoder was not trained."""

_GATHER_TIMEOUT_SECONDS: Final = 600.0


class EvaluationConfig(BaseModel, extra="forbid", frozen=True):
    """What a launch evaluates when a run is trained."""

    protocols: tuple[str, ...] = ("svm@heldout",)

    @model_validator(mode="after")
    def _protocols_are_known(self) -> Self:
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown:
            raise ValueError(f"unknown protocol {unknown[0]!r}; known: {', '.join(PROTOCOLS)}")
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder or its name in ./runs (its newest checkpoint), one of its checkpoints, or an exported folder",
    )
    parser.add_argument("--protocol", metavar="NAME", required=True, help=f"one of: {', '.join(PROTOCOLS)}")
    parser.add_argument("--data", metavar="STORE", required=True, help="URL of the store with the labelled shapes")
    parser.add_argument(
        "--random-weights", action="store_true", help="the same network as it was before the first step"
    )
    parser.add_argument(
        "--record", metavar="LABEL", help="keep the record as PROTOCOL.LABEL.json instead of over the last one"
    )
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Extracts features with all ranks, fits and scores on the first, and writes the record."""
    protocol = find_protocol(arguments.protocol)

    import torch

    from datastore.layout import open_store
    from trainer.distributed import joined
    from trainer.encoders import encoder_url, find_encoder
    from trainer.evaluate.features import extract_features
    from trainer.numerics import exact_float32

    exact_float32()
    store = open_store(arguments.data)
    url = encoder_url(arguments.checkpoint)
    found = find_encoder(url, random_weights=arguments.random_weights)
    encoder = _point_encoder(found)
    began = time.monotonic()
    with joined(_GATHER_TIMEOUT_SECONDS) as world:
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        features = extract_features(
            encoder, store, (TRAIN, TEST), num_points=found.num_points, device=device, world=world
        )
    if not world.is_first:
        return EXIT_DONE
    extracted = time.monotonic()
    record = judge(arguments.protocol, protocol, features[TRAIN], features[TEST], store.class_names, _seed(found))
    record["seconds"] = {
        "features": round(extracted - began, 3),
        "fit_and_score": round(time.monotonic() - extracted, 3),
    }
    record |= _provenance(found, store, features)
    name = record_name(arguments.protocol, arguments.record, found, url)
    _keep(found, url, name, record)
    print(json.dumps(record) if arguments.json else describe(record), flush=True)
    return EXIT_DONE


def find_protocol(name: str) -> LinearSVM:
    """The protocol of that name; an error that lists all, a line each, where there is none."""
    if name not in PROTOCOLS:
        listing = "\n".join(f"  {known:<15} {protocol.summary}" for known, protocol in PROTOCOLS.items())
        raise AskedWrongly(f"Unknown protocol {name!r}. Known protocols:\n{listing}")
    return PROTOCOLS[name]


def judge(
    name: str,
    protocol: LinearSVM,
    train: "ShapeFeatures",
    test: "ShapeFeatures",
    class_names: tuple[str, ...],
    seed: int,
) -> dict[str, Any]:
    """The scores of one protocol, and the settings that led to them. The fit sees training shapes and nothing else."""
    try:
        fitted = fit(protocol, train.values, train.labels, seed)
    except ValueError as error:
        raise DoNotRetry(
            f"Protocol {name} cannot be fitted on {len(train.rows):,} training shapes: {error}. Ingest more shapes."
        ) from error
    scores = score(fitted.classifier.predict(test.values), test.labels, class_names)
    return {
        "protocol": name,
        "accuracy": scores.accuracy,
        "class_mean_accuracy": scores.class_mean_accuracy,
        "per_class_accuracy": scores.per_class_accuracy,
        "confusion": scores.confusion,
        "class_names": list(class_names),
        "c": fitted.c,
        "grid": [{"c": c, "holdout_accuracy": accuracy} for c, accuracy in fitted.grid],
        "converged": fitted.converged,
        "num_train": len(train.rows),
        "num_holdout": fitted.num_holdout,
        "num_test": len(test.rows),
        "feature_dim": train.values.shape[1],
        "seed": seed,
        "settings": fitted.settings(protocol),
    }


def record_name(protocol: str, label: str | None, found: "FoundEncoder", url: str) -> str:
    """PROTOCOL for a run's newest weights; PROTOCOL.LABEL for random weights, an older checkpoint, or on request."""
    if label is None and found.is_random:
        label = RANDOM_WEIGHTS
    elif label is None and found.run is not None and url.rstrip("/") != found.run.url:
        label = f"step-{found.step}"
    return f"{protocol}.{label}" if label else protocol


def describe(record: dict[str, Any]) -> str:
    """The record for people, in two lines."""
    correct = sum(row[index] for index, row in enumerate(record["confusion"]))
    weights = "random weights" if record["checkpoint"]["is_random"] else record["checkpoint"]["url"]
    chosen = " chosen on a hold-out of train" if record["grid"] else ""
    return (
        f"{record['protocol']}: {100 * record['accuracy']:.1f} % of {record['num_test']:,} test shapes ({correct:,}), "
        f"mean over classes {100 * record['class_mean_accuracy']:.1f} %\n"
        f"  {weights}: {record['feature_dim']:,} features, C = {record['c']:g}{chosen}, "
        f"fitted on {record['num_train']:,} training shapes"
    )


def _point_encoder(found: "FoundEncoder") -> Any:
    from models.encoding import PointEncoder

    if not isinstance(found.encoder, PointEncoder):
        raise AskedWrongly(
            f"{found.url} is no encoder of points, and the protocols judge those: give a run with a student."
        )
    return found.encoder


def _seed(found: "FoundEncoder") -> int:
    """The run's seed, so that repeating a run under another seed repeats all of it."""
    return found.config.seed if found.config is not None else int(found.training.get("seed", 0))


def _provenance(found: "FoundEncoder", store: "Store", features: "dict[str, ShapeFeatures]") -> dict[str, Any]:
    """Where everything came from, and what the splits share."""
    from trainer.machine import describe_machine, library_versions

    facts = store_facts(store, found.teacher)
    return {
        "checkpoint": {
            "url": found.url,
            "step": found.step,
            "is_random": found.is_random,
            "config_hash": found.config_hash,
        },
        "num_points": found.num_points or store.attributes.points_per_shape,
        "store": facts,
        "splits": split_facts(store, features[TRAIN], features[TEST], found, facts.get("teacher")),
        "machine": describe_machine(),
        "versions": library_versions(),
        "time": time.time(),
    }


def store_facts(store: "Store", teacher: str | None) -> dict[str, Any]:
    """What the record says of the corpus, so that a report needs no access to it."""
    attributes = store.attributes
    facts: dict[str, Any] = {
        "url": store.url,
        "manifest": store.manifest.number,
        "source_url": attributes.source_url,
        "source_hash": attributes.source_hash,
        "licence": attributes.licence,
        "num_rows": len(store),
        "points_per_shape": attributes.points_per_shape,
        "rig": attributes.rig.name if attributes.rig else attributes.views_from,
        "num_views": attributes.num_views,
        "image_size": attributes.image_size,
        "rows": {split: len(store.rows(split)) for split in store.splits},
        "quarantined": len(store.quarantine),
    }
    keys = [key for key in store.teachers if teacher in (key, key.partition("@")[0])]
    if len(keys) == 1:
        facts["teacher"] = {"key": keys[0], **store.teachers[keys[0]].model_dump(mode="json")}
    return facts


def split_facts(
    store: "Store",
    train: "ShapeFeatures",
    test: "ShapeFeatures",
    found: "FoundEncoder",
    teacher: "dict[str, Any] | None",
) -> dict[str, Any]:
    """What the two splits share, and what the training of the encoder and of its teacher has seen of the test split.

    Counted, not declared; None where nothing tells: the training read another store, or does not say which split.
    """
    test_rows = set(test.rows.tolist())
    train_names, test_names = ({str(name) for name in store.read("id", shapes.rows)} for shapes in (train, test))
    train_clouds = set(train.clouds)

    def num_seen(split: str | None, *, same_corpus: bool) -> int | None:
        if split not in store.splits or not same_corpus:
            return None
        return len(test_rows & set(store.rows(split).tolist()))

    made_by = (teacher or {}).get("training", {})
    teacher_corpus = made_by.get("source_hash") == store.attributes.source_hash
    return {
        "fitted_on": TRAIN,
        "scored_on": TEST,
        "shared_rows": len(test_rows & set(train.rows.tolist())),
        "shared_names": len(train_names & test_names),
        "equal_clouds": sum(cloud in train_clouds for cloud in test.clouds),
        "unlabelled_test_rows": len(store.rows(TEST)) - len(test.rows),
        "trained_on": None if found.is_random else found.split,
        "seen_in_training": 0 if found.is_random else num_seen(found.split, same_corpus=found.read_store(store)),
        "teacher_trained_on": made_by.get("split"),
        "seen_by_teacher": num_seen(made_by.get("split"), same_corpus=teacher_corpus),
    }


def _keep(found: "FoundEncoder", url: str, name: str, record: dict[str, Any]) -> None:
    from datastore.objects import ObjectFolder

    if found.run is not None:
        found.run.write_record(name, record)
    else:
        ObjectFolder(url).put(f"evaluation/{name}.json", json.dumps(record, indent=1).encode())
