"""Asked to stop: Ctrl-C and SIGTERM as a flag that long work looks at between two units, so that units stay whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_asked(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """The event given; without one, one that SIGINT and SIGTERM set while the block runs.

    Python lets only the main thread handle signals. Elsewhere nobody sets the event: who starts a thread gives it one.
    """
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stop or threading.Event()
        return
    event = threading.Event()
    before = {number: signal.signal(number, lambda *_: event.set()) for number in STOP_SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
