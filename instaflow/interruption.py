"""Being told to stop: the first SIGINT, SIGTERM or SIGUSR1 asks, a second SIGINT insists.

SIGUSR1 is what a batch system is asked to send some time before a job's limit.
"""

import signal
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
def listening() -> Iterator[Stop]:
    """A Stop that hears SIGINT, SIGTERM and SIGUSR1 while the block runs."""
    stop = Stop()
    heard: set[int] = set()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.add(number)
        stop.signal = stop.signal or signal.Signals(number).name

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
