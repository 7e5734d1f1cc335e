"""The code in docs/ runs as it stands."""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from datastore.cameras import RIG_NAMES, rig_by_name
from datastore.fetch import FetchConfig
from datastore.ingest import add_arguments, ingest
from datastore.layout import open_store
from datastore.schema import FIELDS
from datastore.sources import format_table, open_source
from datastore.stream import StreamConfig
from models.students import StudentConfig, build_student
from models.students.masked_transformer import MaskedTransformerConfig
from trainer.__main__ import main as trainer_main
from trainer.cache import add_arguments as add_cache_arguments
from trainer.config import load_recipe
from trainer.evaluate import add_arguments as add_evaluate_arguments
from trainer.evaluate.linear_svm import C_GRID, LARGEST_C, PROTOCOLS

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder_with_a_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    source = open_source("demo://shapes?count=24&seed=0")
    ingest(source, str(folder / "shapes.zarr"), rig=rig_by_name("azimuth12", 16), num_points=64, num_workers=1)
    return folder


def run(code: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_plain_zarr_reads_a_store_in_ten_lines(folder_with_a_store: Path) -> None:
    code = python_blocks("store.md")[0]
    imports = set(re.findall(r"^import (\w+)", code, re.MULTILINE))
    assert imports == {"numpy", "zarr"}, "nothing of ours takes part"
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) <= 10
    said = run(code, folder_with_a_store)
    store = open_store(folder_with_a_store / "shapes.zarr")
    row = store.rows()[0]
    seen = store.read("visibility", [row])[0].sum(axis=0)
    name = store.class_names[store.read("label", [row])[0]]
    assert said.split() == f"{len(store.rows())} shapes; the first is a {name} with {seen} points seen a view".split()


def test_the_package_reads_a_store_as_the_docs_show(folder_with_a_store: Path) -> None:
    assert "points" in run(python_blocks("store.md")[1], folder_with_a_store)


def test_the_stream_is_read_as_the_docs_show(folder_with_a_store: Path) -> None:
    said = run(python_blocks("stream.md")[0], folder_with_a_store).splitlines()
    assert "torch.Size([4, 64, 3])" in said[0]
    assert int(said[-1]) == 4 * (len(said) - 1)


def test_the_table_of_fields_names_them_all() -> None:
    page = (DOCS / "store.md").read_text()
    assert [name for name in FIELDS if f"`{name}`" not in page and f"{name}`" not in page] == []


def test_every_format_and_rig_stands_in_the_docs() -> None:
    page = (DOCS / "ingest.md").read_text()
    formats = [line.split()[0] for line in format_table().splitlines()]
    assert len(formats) > 10
    assert [name for name in formats if f"`{name}`" not in page] == []
    assert [name for name in RIG_NAMES if f"`{name}`" not in page and f"--rig {name}`" not in page] == []


def test_every_option_in_the_docs_is_one_of_ingests() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", (DOCS / "ingest.md").read_text()))
    assert named - known == {"--verify", "--contact-sheet"}  # of `viewpoint inspect`


def cache_commands() -> list[list[str]]:
    return [
        shlex.split(line)[1:] for line in re.findall(r"^viewpoint cache .*$", (DOCS / "cache.md").read_text(), re.M)
    ]


def test_every_cache_command_in_the_docs_is_understood_and_every_option_is_there() -> None:
    parser = argparse.ArgumentParser()
    add_cache_arguments(parser)
    commands = cache_commands()
    assert len(commands) == 4
    for words in commands:
        parser.parse_args([word for word in words[1:] if word not in ("--nodes", "4")])  # the launcher's
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", (DOCS / "cache.md").read_text())) - known == {"--nodes"}


def test_cached_fields_are_read_as_the_docs_show(folder_with_a_store: Path) -> None:
    """The docs' commands, at a size for tests and with random weights."""
    url = str(folder_with_a_store / "shapes.zarr")
    small = ["--random-weights", "--image-size", "32"]
    for words in (cache_commands()[1], cache_commands()[2]):
        options = words[words.index("--tokens" if "--tokens" in words else "--from-points") :]
        options = [option if option != "8x8" else "2x2" for option in options]
        found = ["cache", url, "--teacher", words[3], "--model", "test_vit", *small, *options]
        assert trainer_main(found) == 0
    said = run(python_blocks("cache.md")[0], folder_with_a_store)
    lines = said.splitlines()
    assert [line.split("@")[0] for line in lines] == ["clip", "dino"]
    assert "'view_pixels': (64, 3, 2)" in lines[0] and "'view_tokens': (12, 4, 64)" in lines[1]
    assert "--tokens 2x2" in lines[1] and "'view_saliency': 0." in lines[1]


def test_bytes_in_the_docs_are_those_of_the_fields() -> None:
    page = (DOCS / "cache.md").read_text()
    sizes = {
        "features": (12, 1280),
        "tokens": (3, 196, 512),
        "saliency": (3, 196),
        "pixels": (8192, 3, 2),
        "few": (3, 49, 512),
    }
    for size in sizes.values():
        assert f"| {2 * math.prod(size):,} |" in page


def test_every_setting_of_the_stream_in_the_docs_is_one() -> None:
    named = set(re.findall(r"`data\.([a-z_.]+)", (DOCS / "stream.md").read_text()))
    known = {*StreamConfig.model_fields, *(f"fetch.{name}" for name in FetchConfig.model_fields)}
    assert named
    assert named <= known


def test_students_and_operations_are_used_as_the_docs_show(capsys: pytest.CaptureFixture[str]) -> None:
    build, neighbours = python_blocks("models.md")
    exec(build, {})
    exec(neighbours, {})
    assert capsys.readouterr().out == "torch.Size([2, 1024, 1024]) torch.Size([2, 1024])\nTrue\n"


def test_students_have_as_many_parameters_as_the_docs_say() -> None:
    page = (DOCS / "models.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \|.*?\| ([\d,]+) \|", page, re.MULTILINE)
    assert len(rows) == 12
    for config, count in rows:
        module, _, name = config.rpartition(".")
        student = build_student(getattr(importlib.import_module(module), name) if module else json.loads(config))
        assert f"{sum(parameter.numel() for parameter in student.parameters()):,}" == count, config


def test_the_line_for_three_hundred_million_parameters_is_the_one_that_is_tested() -> None:
    (line,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    config = MaskedTransformerConfig.model_validate(yaml.safe_load(line)["student"])
    assert (config.width, config.num_heads, config.checkpoint_activations) == (5, 12, True)


def test_the_docs_name_every_kind_of_student() -> None:
    page = (DOCS / "models.md").read_text()
    union, *_ = get_args(StudentConfig)
    kinds = [config.model_fields["kind"].default for config in get_args(union)]
    assert len(kinds) >= 6
    assert [kind for kind in kinds if f'"kind": "{kind}"' not in page] == []


def test_every_protocol_stands_in_the_docs_with_its_settings() -> None:
    page = (DOCS / "evaluation.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in page.splitlines() if line.startswith("| `svm@")]
    assert [row[:3] for row in rows] == [
        [f"`{name}`", protocol.solver, "chosen" if protocol.c is None else f"{protocol.c:g}"]
        for name, protocol in PROTOCOLS.items()
    ]
    for protocol, (*_, where) in zip(PROTOCOLS.values(), rows, strict=True):
        assert protocol.c_chosen_on.partition(",")[0] in where
    assert f"half decades from {C_GRID[0]:.4f} to {C_GRID[-1]:g}, and on upward to\n   {LARGEST_C:,.0f} while" in page


def test_every_command_for_an_evaluation_in_the_docs_is_understood() -> None:
    page = (DOCS / "evaluation.md").read_text()
    parser = argparse.ArgumentParser()
    add_evaluate_arguments(parser)
    commands = [shlex.split(line)[2:] for line in re.findall(r"^viewpoint evaluate .*$", page, re.M)]
    assert len(commands) == 4
    for words in commands:
        parsed = parser.parse_args([word for word in words if word not in ("--nodes", "4")])  # the launcher's
        assert parsed.protocol in PROTOCOLS
    (assignment,) = re.findall(r"^viewpoint launch .* --set (.*)$", page, re.M)
    assert set(load_recipe("crosspoint", demo=True, assignments=[assignment]).evaluation.protocols) <= set(PROTOCOLS)
    assert set(re.findall(r"svm@\w+", page)) == set(PROTOCOLS)
