"""Processes that share a store: which one this is, and whether another is known to have ended."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process as others can name it: its host, the namespace that its number counts in, its number, its start.

    `started` is the kernel's count of ticks, which tells two processes apart that had the same number; 0 where
    nobody knows it.
    """

    host: str
    namespace: int
    pid: int
    started: int = 0

    def is_gone(self) -> bool:
        """Whether it is known to have ended; of a process on another host, or in another container, nothing is."""
        if (self.host, self.namespace) != (socket.gethostname(), namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's, and lives
            pass
        state, started = state_and_start(self.pid)
        return state in ("Z", "X") or (self.started > 0 and started > 0 and started != self.started)


def this_process() -> Process:
    pid = os.getpid()
    return Process(socket.gethostname(), namespace(), pid, state_and_start(pid)[1])


def namespace() -> int:
    """The set of process numbers that this process sees; containers on one host name have their own. 0: unknown."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def state_and_start(pid: int) -> tuple[str, int]:
    """A process's state letter and its start in ticks since boot, from /proc; "" and 0 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()  # its name stands in parentheses and may hold anything
    return fields[0], int(fields[19])
