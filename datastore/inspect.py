"""Stage: what is in a store, whether it is whole, and how it looks."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE
from datastore.layout import INGEST, QuarantinedRow, Store, open_store
from datastore.progress import Progress, format_bytes

HELP = "say what is in a store, check it, draw some of its shapes"

_SHEET_ROWS = 8
_UNLABELLED = "(unlabelled)"


@dataclass(frozen=True)
class FieldFacts:
    """One array of a store."""

    name: str
    axes: tuple[str, ...]
    row_shape: tuple[int, ...]
    dtype: str
    stored_bytes: int


@dataclass(frozen=True)
class StoreFacts:
    """What `viewpoint inspect` says of a store."""

    url: str
    attributes: dict[str, Any]
    manifest: int
    num_rows: int
    num_written: int  # quarantined ones included
    fields: list[FieldFacts]
    counts: dict[str, dict[str, int]]  # shapes by split and class
    teachers: dict[str, dict[str, Any]]
    quarantine: list[QuarantinedRow]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `viewpoint inspect`."""
    parser.add_argument("store", metavar="STORE", help="path or URL of the store")
    parser.add_argument("--verify", action="store_true", help="check every checksum, and that the fields agree")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="OUT.png", help="draw some shapes, their views and points"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """The exit code of `viewpoint inspect`: 64 where --verify finds something."""
    store = open_store(arguments.store)
    facts = facts_of(store)
    problems = verify_store(store) if arguments.verify else None
    if arguments.contact_sheet is not None:
        from datastore.contact_sheet import contact_sheet, varied_rows

        contact_sheet(store, varied_rows(store, _SHEET_ROWS), arguments.contact_sheet)
    if arguments.json:
        print(json.dumps(asdict(facts) | ({} if problems is None else {"problems": problems})))
    else:
        print(describe(facts))
        if problems is not None:
            print(_describe_problems(problems))
        if arguments.contact_sheet is not None:
            print(f"\nContact sheet: {arguments.contact_sheet}")
    return EXIT_DO_NOT_RETRY if problems else EXIT_DONE


def facts_of(store: Store) -> StoreFacts:
    """What is in a store, without reading more of it than labels and splits."""
    stored_bytes = {
        stored.path: sum(store.manifest.scope(stored.scope).shards[stored.field.name].sizes)
        for stored in store.fields.values()
    }
    rows_of_block = store.attributes.block_rows
    written = sum(
        min(end * rows_of_block, len(store)) - first * rows_of_block
        for first, end in store.manifest.scope(INGEST).block_ranges
    )
    return StoreFacts(
        url=store.url,
        attributes=store.attributes.model_dump(mode="json"),
        manifest=store.manifest.number,
        num_rows=len(store),
        num_written=written,
        fields=[
            FieldFacts(path, stored.field.axes, stored.row_shape, stored.field.dtype, stored_bytes[path])
            for path, stored in store.fields.items()
        ],
        counts=_counts(store),
        teachers={
            key: teacher.model_dump(mode="json")
            | {
                "statistics": {
                    field: {"mean": found.mean, "largest": found.largest}
                    for field, found in store.statistics(key).items()
                }
            }
            for key, teacher in store.teachers.items()
        },
        quarantine=store.quarantine,
    )


def verify_store(store: Store) -> list[str]:
    """All that is wrong with a store, one line each: damaged objects, or fields that contradict each other."""
    from datastore.consistency import find_contradictions
    from datastore.write import verify

    with Progress("checksums", store.manifest.stored_bytes, "bytes") as progress:
        problems = verify(store, progress.update)
    if problems:
        return problems  # what lies in damaged shards cannot be compared
    with Progress("fields", len(store.rows()), "shapes") as progress:
        return find_contradictions(store, progress.update)


def describe(facts: StoreFacts) -> str:
    """The facts for people."""
    attributes = facts.attributes
    num_shapes = facts.num_written - len(facts.quarantine)
    missing = facts.num_rows - facts.num_written
    sections = [
        [
            facts.url,
            *_columns(
                [
                    ("shapes", f"{num_shapes:,}" + (f", and {missing:,} not written yet" if missing else "")),
                    ("from", f"{attributes['source_url']} ({attributes['source_format']})"),
                    ("licence", attributes["licence"]),
                    ("points", _describe_points(attributes)),
                    ("views", _describe_views(attributes)),
                    ("size", format_bytes(sum(each.stored_bytes for each in facts.fields))),
                    ("manifest", f"{facts.manifest}, schema version {attributes['schema_version']}"),
                ]
            ),
        ],
        ["Fields", *_columns([_field_line(each, facts.num_written) for each in facts.fields])],
        ["Shapes by class", *_count_lines(facts)],
    ]
    if facts.teachers:
        sections.append(["Teachers", *_columns([_teacher_line(*item) for item in facts.teachers.items()])])
    if facts.quarantine:
        from datastore.ingest import quarantine_lines

        sections.append([f"In quarantine: {len(facts.quarantine):,}", *quarantine_lines(facts.quarantine)])
    return "\n\n".join("\n".join(section) for section in sections)


def _describe_points(attributes: dict[str, Any]) -> str:
    up, source_up = attributes["up_axis"], attributes["source_up_axis"]
    turned = "" if source_up == up else f" (turned from {source_up})"
    origin = "sampled from meshes" if attributes["geometry"] == "mesh" else "of the source's clouds"
    order = "in the source's order" if attributes["point_order"] == "source" else "in farthest-point order"
    return f"{attributes['points_per_shape']:,} a shape, {origin}, {order}, in the unit ball, {up} up{turned}"


def _describe_views(attributes: dict[str, Any]) -> str:
    size, rig = attributes["image_size"], attributes["rig"]
    made = "the source's own" if rig is None else f"rendered by {attributes['views_from']}, rig {rig['name']}"
    extra = attributes["extra_views"]
    more = f"; up to {extra} extra ones of {attributes['extra_image_size']} px from the source" if extra else ""
    return (
        f"{attributes['num_views']} of {size} x {size} px, {made}; visibility by {attributes['visibility_from']}{more}"
    )


def _counts(store: Store) -> dict[str, dict[str, int]]:
    names = [*store.class_names, _UNLABELLED]  # label -1 is the last
    counts = {}
    for split in store.splits:
        rows = store.rows(split)
        found, times = np.unique(store.read("label", rows), return_counts=True)
        counts[split] = {names[label]: int(number) for label, number in zip(found, times, strict=True)}
    return counts


def _count_lines(facts: StoreFacts) -> list[str]:
    """A table: one line a class, one column a split, and the sums."""
    splits = list(facts.counts)
    names = [*facts.attributes["class_names"], _UNLABELLED]
    present = [name for name in names if any(name in facts.counts[split] for split in splits)]
    table = [(name, *(facts.counts[split].get(name, 0) for split in splits)) for name in present]
    table.append(("all", *(sum(facts.counts[split].values()) for split in splits)))
    return _columns(
        [("", *splits), *[(name, *(f"{count:,}" for count in counts)) for name, *counts in table]], right=True
    )


def _field_line(each: FieldFacts, num_rows: int) -> tuple[str, ...]:
    axes = " x ".join(
        axis if axis.isdecimal() else f"{axis}={size}" for axis, size in zip(each.axes, each.row_shape, strict=True)
    )
    share = f"{format_bytes(each.stored_bytes / num_rows)} a shape" if num_rows else ""
    return each.name, each.dtype, axes or "one value", format_bytes(each.stored_bytes), share


def _teacher_line(key: str, teacher: dict[str, Any]) -> tuple[str, ...]:
    fields = []
    for name, sizes in teacher["fields"].items():
        found = teacher["statistics"].get(name)
        values = f" (mean {found['mean']:.3g}, largest {found['largest']:.3g})" if found else ""
        fields.append(f"{name} {' x '.join(map(str, sizes))}{values}")
    return key, f"{teacher['image_size']} px", teacher["precision"], ", ".join(fields)


def _describe_problems(problems: Sequence[str]) -> str:
    if not problems:
        return "\nVerified: every checksum is right, and the fields agree with each other."
    lines = "\n".join(f"  {problem}" for problem in problems)
    mend = "Restore what is damaged from a copy, or ingest again into a new store."
    return f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{lines}\n{mend}"


def _columns(rows: Sequence[tuple[str, ...]], *, right: bool = False) -> list[str]:
    """Indented lines whose cells stand below each other; `right` aligns all but the first column to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:>{width}}" if right and place else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
