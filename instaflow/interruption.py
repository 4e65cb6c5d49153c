"""Being told to stop: the first SIGINT, SIGTERM or SIGUSR1 asks, a second SIGINT insists.

What keeps nothing to go on with ends at once, and cleans up.

SIGUSR1 is what a batch system is asked to send some time before a job's limit.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Whether this process was told to stop; work looks at it between two steps."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening(*more: signal.Signals) -> Iterator[Stop]:
    """A Stop that hears SIGINT, SIGTERM, SIGUSR1 and what is named while the block runs, unless it is ignored."""
    stop = Stop()
    heard: set[int] = set()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.add(number)
        stop.signal = stop.signal or signal.Signals(number).name

    named = [number for number in more if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
    before = {number: signal.signal(number, hear) for number in (*SIGNALS, *named)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the block as Ctrl-C does: by an exception, here SystemExit with 128 + the signal."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
