"""Imports point one way: launcher -> trainer -> {models, datastore}."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "launcher": {"launcher", "trainer", "models", "datastore"},
    "trainer": {"trainer", "models", "datastore"},
    "models": {"models"},
    "datastore": {"datastore"},
}


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, literal `importlib.import_module` calls included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python file"
    for path in files:
        for module in imported_modules(path):
            top = module.partition(".")[0]
            if top in ALLOWED:
                assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {module}"


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if any(module.partition(".")[0] == "deepspeed" for module in imported_modules(path))
    }
    assert importers == {"trainer/engine.py"}


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    import launcher.local\n    from trainer import config\n")
    assert set(imported_modules(path)) == {"launcher.local", "trainer"}
