"""Files that are complete or absent: atomic writes and content hashes."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instaflow.processes import Process, this_process

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a store without hard links answers to one."""


def write_file(path: Path, content: bytes | str | Iterable[bytes]) -> None:
    """Put `content` at `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    with temporary_with(path, content) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_new(path: Path, content: bytes | str | Iterable[bytes]) -> bool:
    """Put `content` at `path` if nothing is there; False if something is. Whole or absent, like `write_file`.

    Of several processes, on any hosts of a shared store, one succeeds. A store without hard links cannot promise
    that: there, of two at the very same moment, the later one's content stays.
    """
    with temporary_with(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:  # or NFS lost the answer to a link that it made
            return temporary.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    sync_folder(path.parent)
    return True


@contextmanager
def temporary_with(path: Path, content: bytes | str | Iterable[bytes]) -> Iterator[Path]:
    """A file beside `path` that holds `content`, safe on the disk; it is removed unless it was moved away.

    Its name tells who writes it, so that processes on several hosts never share one.
    """
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of writers of `path` that were killed, as far as can be known here.

    Its name may be a pattern, such as `*`.
    """
    for temporary in path.parent.glob(f".{path.name}.tmp-*"):
        if is_leftover(temporary.name):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """What this process calls the file `name` while it writes it."""
    me = this_process()
    return f".{name}.tmp-{me.host}-{me.namespace}-{me.pid}"


def is_leftover(name: str) -> bool:
    """Whether a file is a temporary one of a writer that was killed, as far as can be known."""
    before, _, writer = name.rpartition(".tmp-")
    if not before:
        return False
    who = re.fullmatch(r"(.+)-(\d+)-(\d+)", writer)
    return who is None or Process(who[1], int(who[2]), int(who[3])).is_gone()


def write_json(path: Path, value: Any) -> None:
    write_file(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def replace_folder(temporary: Path, folder: Path) -> None:
    """Move the finished `temporary` folder to its final name, in place of an older one.

    A reader, or a crash, sees a whole folder under the final name or none, never a part of one.
    """
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            open_to_readers(file)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    older = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def open_to_readers(file: Path) -> None:
    """Let those read a file to whom its folder is open: safetensors writes files that are their owner's alone."""
    file.chmod(file.stat().st_mode | file.parent.stat().st_mode & 0o444)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: bytes) -> bytes:
    """Content behind its SHA-256, by which `opened` knows that it is as it was written."""
    return hashlib.sha256(content).digest() + content


def opened(file: bytes) -> bytes | None:
    """What `sealed` sealed; None where it was torn or changed."""
    digest, content = file[: hashlib.sha256().digest_size], file[hashlib.sha256().digest_size :]
    return content if content and hashlib.sha256(content).digest() == digest else None


def fingerprint_of(folder: Path) -> str:
    """Hex SHA-256 over every file below `folder`, by relative name and content; hidden files do not count."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256_of(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def listing_hash(folder: Path) -> str:
    """Hex SHA-256 over the name, size and time of every file below `folder`: it tells that something changed."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            status = file.stat()
            told = f"{file.relative_to(folder).as_posix()}\0{status.st_size} {status.st_mtime_ns}\n"
            digest.update(told.encode(errors="surrogateescape"))
    return digest.hexdigest()


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: it has no half characters, which odd bytes of a path become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
