"""The same work on many items, in several processes that need not be told apart."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from instaflow.errors import InstaFlowError

POLL = 0.1  # seconds between two looks at `stop`

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int, stop: Callable[[], bool] = lambda: False
) -> Generator[Result, None, None]:
    """`work(item)` of each item as it comes, in any order; ends early if `stop` says so.

    With one worker, or one item, in this process, else in forked ones, which end with this generator, at once even
    in the midst of an item. An InstaFlowError of theirs is raised here, and one more where a process was killed.
    """
    if workers == 1 or len(items) == 1:
        for item in items:
            if stop():
                return
            yield work(item)
        return
    fork = multiprocessing.get_context("fork")  # starts in milliseconds, and shares what is loaded
    turn = fork.Value("q", 0)
    processes: dict[Any, Any] = {}  # each by the connection that brings its results
    try:
        for _ in range(min(workers, len(items))):
            receiver, sender = fork.Pipe(duplex=False)
            processes[receiver] = fork.Process(target=serve, args=(work, items, turn, sender, os.getpid()), daemon=True)
            processes[receiver].start()
            sender.close()
        while processes and not stop():
            ready: Any
            for ready in wait(list(processes), POLL):
                try:
                    result = ready.recv()
                except EOFError:
                    check_end(processes.pop(ready))
                    continue
                if isinstance(result, InstaFlowError):
                    raise result
                yield result
    finally:
        for process in processes.values():
            process.kill()


def serve(
    work: Callable[[Item], Any], items: Sequence[Item], turn: Any, sender: Connection, parent: int
) -> None:  # pragma: no cover
    """Take the next item's turn until none is left, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while os.getppid() == parent:
        with turn.get_lock():
            place, turn.value = turn.value, turn.value + 1
        if place >= len(items):
            return
        try:
            sender.send(work(items[place]))
        except InstaFlowError as error:
            sender.send(InstaFlowError(error.message, error.hint))  # its own kind may not survive the way
            return


def check_end(process: Any) -> None:
    """Raises InstaFlowError if a process ended before its work did."""
    process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        raise InstaFlowError(f"A worker process was ended by {name}", "If memory ran out: fewer --workers need less")
    if process.exitcode:
        raise RuntimeError("a worker process failed; its traceback stands above")
