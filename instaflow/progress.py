"""How far the work is: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY = 10.0  # seconds between two plain lines


class Progress:
    """A named piece of work of `total` units, of which `start` were done before.

    Use it as a context; `update` says how many units are done, with figures to show beside.
    """

    def __init__(self, label: str, *, total: int, unit: str, start: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
        self.quiet = quiet
        self.began = self.said = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            self.live = Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # as wide as the terminal leaves it
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                TextColumn("{task.fields[figures]}"),
                expand=True,
            )
            self.live.start()
            self.task = self.live.add_task(self.label, total=self.total, completed=self.start, rate="", figures="")
        return self

    def update(self, done: int, **figures: float) -> None:
        self.done = done
        if self.quiet:
            return
        now = time.monotonic()
        rate = (done - self.start) / max(now - self.began, 1e-9)
        speed = f"{rate:,.{1 if rate < 10 else 0}f}"
        words = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        if self.live:
            self.live.update(self.task, completed=done, rate=f"{speed} {self.unit}/s", figures=words)
        elif now - self.said >= PLAIN_EVERY:
            self.said = now
            left = (self.total - done) / max(rate, 1e-9)
            line = f"{self.label}: {done:,}/{self.total:,} {self.unit}, {speed}/s, {left:,.0f} s left  {words}"
            print(line.rstrip(), flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()
        elif not self.quiet and kind is None:
            seconds = time.monotonic() - self.began
            more = f"{self.done - self.start:,} more, now " if self.start else ""
            print(f"{self.label}: {more}{self.done:,} {self.unit} in {seconds:,.1f} s", flush=True)
