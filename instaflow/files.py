"""Files that are complete or absent: atomic writes and content hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes | str | Iterable[bytes]) -> None:
    """Put `content` at `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`. Only its one writer may call this."""
    for temporary in path.parent.glob(f".{path.name}.tmp-*"):
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Move the finished `temporary` folder to its final name, in place of an older one.

    A reader, or a crash, sees a whole folder under the final name or none, never a part of one.
    """
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    older = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


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


def fingerprint_of(folder: Path) -> str:
    """Hex SHA-256 over every file below `folder`, by relative name and content; hidden files do not count."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
