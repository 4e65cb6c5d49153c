"""What a run relies on in the file system of its folder, tried there: renames, links, locks, times, speed, room."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from instaflow.errors import InstaFlowError
from instaflow.files import replace_folder, write_file, write_new
from instaflow.rundir import locked
from pipelines.doctor_table import FAILURE, OK, WARNING
from pipelines.plan_tables import sized

TRIED = 256 * 2**20  # bytes that are written and read
BLOCK = 4 * 2**20
CHECKPOINT = 16 * 860e6  # bytes of Stable Diffusion 1.5's: weights, average and two moments, each in float32
SLOW = 300  # seconds for one such
APART = 5.0  # seconds between two clocks, from which on the status tells wrong ages
RELEASED = 10.0  # seconds until the lock of a process that was killed must be free

HOLD = """
import sys
from pathlib import Path
from instaflow.rundir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def renames(place: Path) -> tuple[str, ...]:
    """Whole files and folders in place of older ones, and files that only one of several processes may make."""
    shared = "Put the run's folder on another file system: shards, checkpoints and done marks rely on it"
    file, folder = place / "file", place / "folder"
    write_file(file, "old")
    with open(file) as reader:
        write_file(file, "new")
        if (file.read_text(), reader.read()) != ("new", "old"):
            return FAILURE, "a renamed file does not take the place of an older one that is being read", shared
    for content in ("old", "new"):
        temporary = place / ".folder"
        temporary.mkdir()
        (temporary / "file").write_text(content)
        replace_folder(temporary, folder)
        if (folder / "file").read_text() != content:
            return FAILURE, "a renamed folder does not take the place of an older one", shared
    if [write_new(place / "once", content) for content in ("first", "second")] != [True, False]:
        return FAILURE, "a file that is there already is made once more", shared
    try:
        os.link(file, place / "link")
    except OSError as error:
        return (
            WARNING,
            f"files take the place of others whole, but there are no hard links ({error.strerror})",
            "Of two workers that want the same shard at the very same moment, both may make it: a waste, no fault",
        )
    return OK, "files and folders take the place of others whole; hard links"


def locks(place: Path) -> tuple[str, ...]:
    """Whether a stage's lock keeps another process out, and is free when its holder was killed."""
    remedy = "Mount it with locks (Lustre: -o flock; NFS: without nolock): two commands could work on one stage at once"
    words = [sys.executable, "-c", HOLD, str(place / "stage")]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stderr
        if holder.stdout.readline().strip() != "held":
            reason = (holder.stderr.read().strip().splitlines() or ["the lock's holder ended"])[-1]
            return FAILURE, f"a stage's folder cannot be locked: {reason}", remedy
        if is_free(place / "stage"):
            return FAILURE, "a lock keeps no other process out", remedy
    finally:
        holder.kill()
        holder.communicate()
    deadline = time.monotonic() + RELEASED
    while not is_free(place / "stage"):
        if time.monotonic() > deadline:
            return FAILURE, f"the lock of a process that was killed is still held {RELEASED:.0f} s later", remedy
        time.sleep(0.1)
    return OK, "a stage's lock keeps others out, and is free when its holder was killed"


def is_free(folder: Path) -> bool:
    """Whether a stage's folder can be locked from here."""
    try:
        with locked(folder):
            return True
    except InstaFlowError:
        return False


def clock(place: Path) -> tuple[str, ...]:
    """This machine's clock beside that of the file system."""
    before = time.time()
    (place / "clock").touch()
    apart = (place / "clock").stat().st_mtime - (before + time.time()) / 2
    if abs(apart) > APART:
        return (
            WARNING,
            f"the file system's clock is {abs(apart):,.0f} s {'ahead of' if apart > 0 else 'behind'} this machine's",
            "Have both set by one server (NTP): `instaflow status` goes by the files' times",
        )
    return OK, "the file system's is this machine's"


def rate(place: Path) -> tuple[str, ...]:
    """Bytes a second, written until they are on the disk, and read back from there as far as the system allows that."""
    if shutil.disk_usage(place).free < 2 * TRIED:
        return FAILURE, f"not even {sized(2 * TRIED)} are free", "Make room, or choose another place for the run"
    block, file = os.urandom(BLOCK), place / "large"
    start = time.perf_counter()
    with open(file, "wb") as writer:
        for _ in range(TRIED // BLOCK):
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    written = TRIED / (time.perf_counter() - start)
    with open(file, "rb") as reader:
        if hasattr(os, "posix_fadvise"):  # else it would come from memory
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while reader.read(BLOCK):
            pass
    read = TRIED / (time.perf_counter() - start)
    words = f"{sized(written)}/s written, {sized(read)}/s read"
    if (seconds := CHECKPOINT / written) > SLOW:
        return (
            WARNING,
            words,
            f"A checkpoint of Stable Diffusion 1.5 takes {seconds / 60:,.0f} min to write: choose a faster place, or a "
            "larger checkpoint_every",
        )
    return OK, words


def room(place: Path, needed: float | None) -> tuple[str, ...]:
    """What is free, beside the bytes that the experiment will take, if that is known."""
    usage, nodes = shutil.disk_usage(place), os.statvfs(place)
    if nodes.f_files and not nodes.f_favail:
        return FAILURE, "no further file can be made: all inodes are in use", "Delete files, or choose another place"
    words = f"{sized(usage.free)} free of {sized(usage.total)}"
    if needed is None:
        return OK, words
    words += f"; the experiment takes {sized(needed)} by its plan"
    if usage.free < needed:
        remedy = "Make room, choose another `run`, or send couplings to a store (`output`); a quota may be lower still"
        return FAILURE, words, remedy
    return OK, words
