"""What people read when a stage ends in an error, and the exit code that goes with it."""

import argparse
import errno

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_FAILED, EXIT_STOPPED, AskedWrongly
from trainer.__main__ import run_guarded


class Failing:
    """A stage that ends in an error."""

    HELP = ""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None."""

    def run(self, arguments: argparse.Namespace) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (AskedWrongly("no such job"), 2, "viewpoint: no such job"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/b"),
            EXIT_DO_NOT_RETRY,
            "a.txt/b: Not a directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), EXIT_DO_NOT_RETRY, "/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), EXIT_DO_NOT_RETRY, "disk is full while writing /x"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), EXIT_FAILED, "Traceback"),
        (ModuleNotFoundError("no zarr", name="zarr"), EXIT_DO_NOT_RETRY, "package 'zarr' is missing"),
        (KeyboardInterrupt(), EXIT_STOPPED, "the same command goes on"),
    ],
)
def test_each_kind_of_error_says_what_to_do_and_has_its_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(Failing(error), argparse.Namespace()) == code
    assert message in capsys.readouterr().err
