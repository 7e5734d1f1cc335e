"""What went wrong, for people: one message (what, where, how to mend it) and the exit code that belongs to it."""

from typing import ClassVar, Final

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_ASKED_WRONGLY: Final = 2
EXIT_DO_NOT_RETRY: Final = 64
EXIT_UNAVAILABLE: Final = 69
EXIT_STOPPED: Final = 75


class ViewpointError(Exception):
    """An error whose message is meant for the person at the terminal; no traceback is shown with it."""

    exit_code: ClassVar[int] = EXIT_FAILED


class AskedWrongly(ViewpointError):
    """Usage: unknown job, bad recipe, an option out of range."""

    exit_code = EXIT_ASKED_WRONGLY


class Unavailable(ViewpointError):
    """Something outside does not answer, such as storage: the same will work once it does."""

    exit_code = EXIT_UNAVAILABLE


class DoNotRetry(ViewpointError):
    """Configuration, data or machine: trying again without a change would fail again."""

    exit_code = EXIT_DO_NOT_RETRY


class StoreError(DoNotRetry):
    """A store that is missing, damaged, of an unknown version, or holds something else than asked for."""


class MissingField(StoreError):
    """A store lacks a field that is read from it."""


class SourceError(DoNotRetry):
    """Shapes that cannot be read: missing, empty or not in the format promised."""


class Stopped(ViewpointError):
    """Asked to stop, and everything finished so far is saved: the same command goes on."""

    exit_code = EXIT_STOPPED
