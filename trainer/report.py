"""Stage: writes one page about a run, or about several side by side, from what lies in their folders."""

import argparse
import datetime
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from datastore.errors import EXIT_DONE, StoreError
from datastore.progress import format_seconds
from trainer.charts import ABSENT
from trainer.evaluate.linear_svm import PROTOCOLS

if TYPE_CHECKING:
    from trainer.page import Check, Curve, Outcome, RunFacts
    from trainer.runfolder import Record, RunFolder

HELP = "write one page about a run, or about several side by side"

RANDOM: Final = "random weights"
_CONTACT_SHEET_SHAPES: Final = 6
_SHOWN_HASH_DIGITS: Final = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the run's folder, or its name in ./runs")
    parser.add_argument(
        "--out", metavar="FILE", help="page to write (default: RUN/report.html; of several runs, ./comparison.html)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints where it lies."""
    from trainer.page import render
    from trainer.runfolder import find_run

    folders = [find_run(run) for run in arguments.runs]
    page = render([read_run(folder) for folder in folders], made=_made(arguments.runs))
    if arguments.out is None and len(folders) == 1:
        folders[0].write_text("report.html", page)
        written = f"{folders[0].url}/report.html"
    else:
        written = arguments.out or "comparison.html"
        path = Path(written)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    print(json.dumps({"report": written, "runs": [folder.url for folder in folders]}) if arguments.json else written)
    return EXIT_DONE


def read_run(folder: "RunFolder") -> "RunFacts":
    """Everything that the page says of a run; what is not there yet stays empty."""
    from trainer.page import RunFacts

    text = folder.read_text("config.yaml") or ""
    settings = dict(_dotted(_parsed(text)))
    arms = folder.arms()
    events = folder.events()
    records = folder.records()
    protocol = _main_protocol(settings, records)
    record = records.get(protocol) if protocol is not None else None
    own_label = _own_label(settings, arms)
    job = str(settings.get("job", "run"))
    is_demo = str(settings.get("prepare.corpus.source", "")).startswith("demo://")
    store_url = settings.get("data.store_url")
    evaluate = f"viewpoint evaluate {folder.url} --protocol svm@heldout --data {store_url or 'STORE'}"
    return RunFacts(
        name=folder.name,
        job=job,
        subtitle=f"{job} · run {folder.name}"
        + (" · demo profile: a procedural corpus, small networks" if is_demo else ""),
        config_yaml=text,
        settings=settings,
        protocol=protocol,
        protocol_note=_protocol_note(record),
        outcomes=tuple(_outcomes(protocol, own_label, records, arms)),
        other_scores=tuple(_other_scores(protocol, own_label, records, arms)),
        confusion=None if record is None else (tuple(record["class_names"]), record["confusion"]),
        curves={own_label: _curves(folder)} | {spoken(name): _curves(arm) for name, arm in arms.items()},
        ran=_what_ran(folder, settings, events, record),
        data=_data_facts(store_url, settings, record),
        checks=_checks(record),
        stage_seconds={event["title"]: event["seconds"] for event in events if event["event"] == "step_finished"},
        contact_sheet=_contact_sheet(store_url),
        next_command=evaluate if "student.kind" in settings else "",
    )


def spoken(name: str) -> str:
    """An arm's or a record's name as people say it."""
    return name.replace("_", " ")


def _own_label(settings: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    """What the run's own encoder is called beside the others."""
    return "distilled" if settings.get("objective.teacher") else "trained"


def _main_protocol(settings: Mapping[str, Any], records: "Mapping[str, Record]") -> str | None:
    """The protocol of the headline: the first that the recipe names and that is recorded, else any that is."""
    wanted = list(settings.get("evaluation.protocols") or ())
    found = [name for name in (*wanted, *records) if name in records and name in PROTOCOLS]
    return found[0] if found else None


def _outcomes(
    protocol: str | None, own_label: str, records: "Mapping[str, Record]", arms: "Mapping[str, RunFolder]"
) -> "Iterator[Outcome]":
    """The scores that the headline compares: the run's own, each arm's, that of random weights."""
    from trainer.page import Outcome

    if protocol is None:
        return
    found = {own_label: records.get(protocol)}
    found |= {spoken(name): arm.records().get(protocol) for name, arm in arms.items()}
    found[RANDOM] = records.get(f"{protocol}.random_weights")
    for label, record in found.items():
        if record is not None:
            yield Outcome(
                label=label,
                accuracy=record["accuracy"],
                class_mean_accuracy=record["class_mean_accuracy"],
                per_class_accuracy=record["per_class_accuracy"],
                num_test=record["num_test"],
            )


def _other_scores(
    protocol: str | None, own_label: str, records: "Mapping[str, Record]", arms: "Mapping[str, RunFolder]"
) -> Iterator[tuple[str, str, float]]:
    """Every other record: of further protocols, older checkpoints, and under labels that a person gave."""
    for own, name_of, found in (
        (True, own_label, records),
        *((False, spoken(name), arm.records()) for name, arm in arms.items()),
    ):
        for name, record in found.items():
            if name == protocol or (own and name == f"{protocol}.random_weights"):
                continue
            kind, _, label = name.partition(".")
            who = RANDOM if record["checkpoint"]["is_random"] else name_of
            extra = "" if label in ("", "random_weights") else f", {label}"
            yield kind, f"{who}{extra}", record["accuracy"]


def _protocol_note(record: "Record | None") -> str:
    """How the headline's number was made, in one sentence."""
    if record is None:
        return ""
    origin = "chosen on a hold-out of train" if record["grid"] else "the preset's"
    num_classes = sum(1 for accuracy in record["per_class_accuracy"].values() if accuracy is not None)
    return (
        f"Linear SVM on frozen features ({record['protocol']}), C = {record['c']:g}, {origin}, fitted on "
        f"{record['num_train']:,} training shapes; {record['num_test']:,} test shapes of {num_classes} classes, "
        f"scored once."
    )


def _curves(folder: "RunFolder") -> "dict[str, Curve]":
    """The loss and its terms over steps. A step that was repeated after a restart counts as it was done last."""
    by_step = {record["step"]: record for record in folder.metrics() if math.isfinite(record["loss"])}
    lines = [by_step[step] for step in sorted(by_step)]
    terms = list(dict.fromkeys(term for line in lines for term in line["terms"]))
    curves: dict[str, Curve] = {}
    if len(terms) > 1:
        curves["loss"] = [line["step"] for line in lines], [line["loss"] for line in lines]
    for term in terms:
        having = [line for line in lines if term in line["terms"]]
        curves[term] = [line["step"] for line in having], [line["terms"][term] for line in having]
    return curves


def _what_ran(
    folder: "RunFolder", settings: Mapping[str, Any], events: "Sequence[Record]", record: "Record | None"
) -> dict[str, str]:
    launched = _last(events, "launch_started")
    started, finished = _last(events, "started"), _last(events, "finished")
    metrics = folder.metrics()
    facts: dict[str, str] = {"state": _state(events)}
    if "student.kind" in settings:
        facts["student"] = _with_width(settings, "student")
    if "objective.image_model.trunk.name" in settings:
        facts["image network"] = (
            f"{settings['objective.image_model.trunk.name']}, {settings['objective.image_model.trunk.image_size']} px"
        )
    if settings.get("objective.teacher"):
        facts["teacher"] = str(settings["objective.teacher"])
    if launched is not None:
        facts["nodes"] = f"{launched['nodes']} ({launched['world']} processes)"
    elif started is not None:
        facts["processes"] = str(started["world"])
    if metrics and started is not None:
        facts["steps"] = f"{metrics[-1]['step']:,} of {started['total_steps']:,}, {metrics[-1]['epoch']:.3g} epochs"
    facts["shapes a step"] = str(settings.get("global_batch", ABSENT))
    facts["seed"] = str(settings.get("seed", 0))
    if metrics:
        facts["throughput"] = f"{median(line['samples_per_second'] for line in metrics):,.0f} shapes/s (median step)"
        facts["waiting for data"] = f"{100 * median(line['data_wait_share'] for line in metrics):.1f} % (median step)"
    if finished is not None:
        facts["training time"] = format_seconds(sum(finished["seconds"].values()))
    starts = sum(event["event"] == "started" for event in events)
    if starts > 1:
        facts["restarts"] = str(starts - 1)
    if events:
        facts["begun"] = _clock(events[0]["time"])
    if record is not None:
        facts["machine"] = _machine(record["machine"])
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts["config hash"] = _config_hash(folder)
    return facts


def _state(events: "Sequence[Record]") -> str:
    """Whether the run is done, as its last word says."""
    last = _last(events, "launch_complete", "finished", "stopped", "not_finite", "launch_failed", "started")
    if last is None:
        return "not started"
    states = {
        "launch_complete": "finished",
        "finished": "trained",
        "stopped": f"stopped at step {last.get('step')}",
        "not_finite": f"broken off at step {last.get('step')}: the loss was not finite",
        "launch_failed": f"failed in {last.get('step')}",
        "started": "running, or ended without a word",
    }
    return states[last["event"]]


def _data_facts(store_url: str | None, settings: Mapping[str, Any], record: "Record | None") -> dict[str, str]:
    if record is None:
        return {"store": str(store_url)} if store_url else {}
    store = record["store"]
    used = record["num_points"]
    points = f"{store['points_per_shape']:,}, farthest first"
    facts = {
        "store": store["url"],
        "source": store["source_url"],
        "source hash": store["source_hash"][:_SHOWN_HASH_DIGITS],
        "manifest": str(store["manifest"]),
        "points a shape": points if used == store["points_per_shape"] else f"{points}; the first {used:,} are used",
        "views a shape": f"{store['num_views']} of {store['image_size']} px, rig {store['rig']}",
        "splits": ", ".join(f"{split} {count:,}" for split, count in store["rows"].items()),
        "in quarantine": f"{store['quarantined']:,} of {store['num_rows']:,} shapes",
        "licence": store["licence"],
    }
    if teacher := store.get("teacher"):
        made_by = teacher.get("training", {}).get("job")
        facts["teacher's features"] = f"{teacher['key']}, {teacher['dim']} numbers a view" + (
            f", trained by job {made_by}" if made_by else ""
        )
    return facts


def _checks(record: "Record | None") -> "tuple[Check, ...]":
    """What the record counted of the splits, as statements that hold or fail."""
    from trainer.page import Check

    if record is None:
        return ()
    splits, num_test = record["splits"], record["num_test"]
    shared = (splits["shared_rows"], splits["shared_names"], splits["equal_clouds"])
    checks = [
        Check(
            not any(shared),
            f"Of {record['num_train']:,} training and {num_test:,} test shapes, {shared[0]} are the same row, "
            f"{shared[1]} have the same name, and {shared[2]} are equal point for point.",
        ),
        _seen("The encoder's training", splits["trained_on"], splits["seen_in_training"], num_test),
    ]
    if record["store"].get("teacher"):
        checks.append(
            _seen("The teacher's training", splits["teacher_trained_on"], splits["seen_by_teacher"], num_test)
        )
    checks.append(
        Check(
            bool(record["grid"]),
            f"C was chosen on {record['num_holdout']:,} shapes held out of train; test was scored once."
            if record["grid"]
            else f"C = {record['c']:g} is a published preset, which its authors chose on a test split.",
        )
    )
    return tuple(checks)


def _seen(who: str, split: str | None, count: int | None, num_test: int) -> "Check":
    from trainer.page import Check

    if count is None:
        return Check(None, f"{who}: no record tells how many of the test shapes it has seen.")
    return Check(count == 0, f"{who} read split “{split}”, which holds {count:,} of the {num_test:,} test shapes.")


def _contact_sheet(store_url: str | None) -> bytes | None:
    """A PNG of some shapes; nothing where the store has moved away or holds no views."""
    from datastore.contact_sheet import draw_contact_sheet, varied_rows
    from datastore.layout import open_store

    if store_url is None:
        return None
    try:
        store = open_store(store_url)
        sheet = draw_contact_sheet(store, varied_rows(store, _CONTACT_SHEET_SHAPES))
    except StoreError as error:
        print(f"viewpoint: the report has no picture of the corpus: {error}", file=sys.stderr)
        return None
    content = io.BytesIO()
    sheet.quantize(colors=192).save(content, format="PNG", optimize=True)  # a third of the size, and looks the same
    return content.getvalue()


def _parsed(text: str) -> Any:
    import yaml

    return yaml.safe_load(text) or {}


def _dotted(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`engine.optimizer.lr`, 0.1 and so on, for every leaf."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _dotted(value, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, tree


def _config_hash(folder: "RunFolder") -> str:
    """As config.yaml's first line says it."""
    first, _, _ = (folder.read_text("config.yaml") or "").partition("\n")
    return first.removeprefix("# hash ") if first.startswith("# hash ") else ABSENT


def _with_width(settings: Mapping[str, Any], section: str) -> str:
    width = settings.get(f"{section}.width")
    return f"{settings[f'{section}.kind']}" + (f", width {width:g}" if width is not None else "")


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_bytes'] / 2**30:.0f} GiB"]
    return ", ".join([*parts, *machine["accelerators"]])


def _last(events: "Sequence[Record]", *kinds: str) -> "Record | None":
    return next((event for event in reversed(events) if event["event"] in kinds), None)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _made(urls: Sequence[str]) -> str:
    from trainer.machine import library_versions

    version = library_versions().get("viewpoint", "")
    return f"Viewpoint {version} · written {_clock(time.time())} by viewpoint report {' '.join(urls)}"
