"""Being told to stop: the first SIGINT or SIGTERM asks, a second SIGINT insists."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether this process was told to stop; work looks at it between two steps."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening() -> Iterator[Stop]:
    """A Stop that hears SIGINT and SIGTERM while the block runs."""
    stop = Stop()
    heard: set[int] = set()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.add(number)
        stop.signal = stop.signal or signal.Signals(number).name

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
