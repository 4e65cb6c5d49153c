"""Leases: who makes which shard, among any number of workers on a shared store.

`leases/00012.json` {host, namespace, pid, started, heartbeat} says who is at work on shard 12. Its holder renews the
heartbeat; a lease whose holder is dead is another worker's to take. A lease is an economy and no more: two workers
that make the same shard all the same write the same bytes. What counts is the sidecar.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from instaflow.couplings.shards import NotWritten, sidecar_path
from instaflow.files import remove_leftovers, write_file, write_new
from instaflow.processes import Process, this_process

HEARTBEAT = 15.0  # seconds between two
STALE = 120.0  # seconds without one, after which a holder counts as dead; a network's cache may hide one for 60
POLL = 5.0  # seconds between two looks at shards that others make

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heart:
    """The thread that renews a lease until it is told to end."""

    thread: threading.Thread
    ended: threading.Event


class Leases:
    """This process's dealings with the leases in a couple stage's folder; used as a context, it gives all back at last.

    No two clocks are compared: a heartbeat is stale when this process has seen it unchanged for `STALE` seconds of its
    own. A holder on this host that has ended is known to be dead at once.
    """

    def __init__(self, folder: Path) -> None:
        self.stage, self.folder = folder, folder / "leases"
        self._hearts: dict[int, Heart] = {}
        self._seen: dict[int, tuple[bytes, float]] = {}  # a lease's content, and when it was first seen

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in list(self._hearts):
            self.give_back(shard)

    def turns(
        self, shards: list[int], stop: Callable[[], bool], unmark: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, Callable[[], bool]]]:
        """Each of `shards` that no sidecar marks as done, with its lease; ends when the rest is done or is held here.

        Beside it a function that tells whether the lease was lost meanwhile: to go on were a waste. Who takes a shard
        gives its lease back when it is written or abandoned, at once or while further ones are taken. Waits for shards
        that others hold. Ends early if `stop` says so. Raises NotWritten. `unmark` takes a shard's sidecar away when
        its turn has come: so a bad shard is made again, and the others stay as they are until then.
        """
        waiting = False
        while shards:
            others = []
            for shard in shards:
                if stop():
                    return
                if unmark:
                    unmark(shard)
                if self._is_made(shard):
                    continue
                if self._take(shard):
                    lost = self._hold(shard)
                    if self._is_made(shard):  # a moment ago, by who held it before
                        self.give_back(shard)
                    else:
                        yield shard, lost
                if shard not in self._hearts and not self._is_made(shard):
                    others.append(shard)
            if len(others) == len(shards) and not stop():
                if not waiting:
                    logger.warning("%s: waiting for other workers, who make the last shards", self.stage.name)
                waiting = True
                time.sleep(POLL)
            shards, unmark = others, None

    def give_back(self, shard: int) -> None:
        """End this process's lease of a shard. From any thread."""
        heart = self._hearts.pop(shard)
        heart.ended.set()
        heart.thread.join()
        with suppress(OSError):
            if self._is_mine(shard):
                self._path(shard).unlink()

    def clear(self) -> None:
        """Remove every lease, when all shards are made and nobody needs one, and what killed workers left."""
        with suppress(OSError):
            remove_leftovers(sidecar_path(self.stage, 0).with_name("*"))
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _is_made(self, shard: int) -> bool:
        return sidecar_path(self.stage, shard).exists()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    def _take(self, shard: int) -> bool:
        """Lease a shard that is free, or whose holder is dead; False if another holds it."""
        path = self._path(shard)
        try:
            self.folder.mkdir(exist_ok=True)
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                return write_new(path, json.dumps(lease()))
            if not self._is_dead(shard, content):
                return False
            write_file(path, json.dumps(lease()))
            return True
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.stage.is_dir():  # `clear`ed at this moment
                return False
            raise NotWritten(path, error) from error

    def _is_dead(self, shard: int, content: bytes) -> bool:
        holder = holder_of(content)
        if holder and (holder.is_gone() or holder == this_process()):
            return True
        before, since = self._seen.get(shard, (None, 0.0))
        if content != before:
            self._seen[shard] = content, time.monotonic()
            return False
        return time.monotonic() - since > STALE

    def _hold(self, shard: int) -> Callable[[], bool]:
        """Keep a lease alive until it is given back; returns what tells whether it was lost."""
        lost, ended = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._beat, args=(shard, lost, ended), daemon=True)
        self._hearts[shard] = Heart(thread, ended)
        thread.start()
        return lost.is_set

    def _beat(self, shard: int, lost: threading.Event, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):  # the next one may get through
                if not self._is_mine(shard):
                    lost.set()
                    return
                write_file(self._path(shard), json.dumps(lease()))

    def _is_mine(self, shard: int) -> bool:
        try:
            return holder_of(self._path(shard).read_bytes()) == this_process()
        except FileNotFoundError:
            return False


def lease() -> dict[str, str | int | float]:
    """This process's lease as of now; `heartbeat` is for people in seconds since 1970, for workers a mark of change."""
    return {**asdict(this_process()), "heartbeat": round(time.time(), 3)}


def holder_of(content: bytes) -> Process | None:
    """Who holds a lease; None where it does not tell."""
    try:
        fields = json.loads(content)
        return Process(**{key: fields[key] for key in ("host", "namespace", "pid", "started")})
    except (ValueError, KeyError, TypeError):
        return None
