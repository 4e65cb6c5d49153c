"""Stores that fsspec knows by a URL (s3://bucket/folder, sftp://host/folder...): files put there whole, and read back.

Credentials and endpoints are fsspec's to know: its configuration files, its variables (FSSPEC_S3_ENDPOINT_URL...),
and whatever the store's own package looks at.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from instaflow.errors import ConfigError, DataError, reason_of
from instaflow.files import is_leftover, remove_leftovers, temporary_name, write_file

ATOMIC = frozenset({"s3", "gs", "abfs", "az", "oci", "oss", "hf", "memory"})
"""Where a file appears whole under its name or not at all; elsewhere it is put beside, then renamed."""
PAUSES = (1.0, 4.0, 15.0)  # seconds before each further try, where the network or the store fails
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError)
"""What no further try would mend."""
BLOCK = 1 << 20  # bytes read at a time

T = TypeVar("T")
logger = logging.getLogger(__name__)


class StoreError(DataError):
    """A store that can't be reached, or that refuses. Says nothing of the files there."""

    def __init__(self, url: str, error: Exception, doing: str) -> None:
        super().__init__(f'"{url}" could not be {doing}: {reason_of(error)}', hint_for(error))


class Store:
    """A folder at a URL; its files go by names relative to it.

    A failure that may pass is waited out for `PAUSES`. What then remains raises StoreError; a file that is not there
    raises FileNotFoundError.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def place(self, name: str) -> str:
        """A file's own URL."""
        return f"{self.url}/{name}" if name else self.url

    def make_folder(self, folder: str) -> None:
        def make(system: Any, path: str) -> None:
            if not ATOMIC & protocols(system):  # an object store has no folders, but might make a bucket
                system.makedirs(path, exist_ok=True)

        self._patiently(folder, "written", make)

    def put(self, name: str, content: bytes | Path) -> None:
        """Put a file there: bytes, or those of a local file. A reader, or a crash, sees it whole or not at all.

        On a store that cannot replace a file at once, a crash may leave none where one was.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size

        def write(system: Any, path: str) -> None:
            if "file" in protocols(system):
                remove_leftovers(Path(path))
                write_file(Path(path), content if isinstance(content, bytes) else blocks(content))
                return
            folder, _, last = path.rpartition("/")
            target = path if ATOMIC & protocols(system) else f"{folder}/{temporary_name(last)}"
            if isinstance(content, bytes):
                system.pipe_file(target, content)
            else:
                system.put_file(str(content), target)
            system.invalidate_cache()
            if (arrived := system.info(target)["size"]) != size:
                raise OSError(f"{arrived} of {size} bytes arrived")
            if target != path:
                rename(system, target, path)

        self._patiently(name, "written", write)

    def read(self, name: str) -> bytes:
        def read(system: Any, path: str) -> bytes:
            try:
                content: bytes = system.cat_file(path)
            except FileNotFoundError:
                system.invalidate_cache()
                if system.exists(path):  # some say so of a connection that broke
                    raise OSError("the connection broke") from None
                raise
            return content

        return self._patiently(name, "read", read)

    def read_all(self, folder: str, names: list[str]) -> dict[str, bytes]:
        """Several small files of a folder, at once where the store can do so; those that are not there are left out."""

        def read(system: Any, path: str) -> dict[str, bytes]:
            found = system.cat([f"{path}/{name}" for name in names], on_error="return")
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
            return {path.rpartition("/")[2]: data for path, data in found.items() if isinstance(data, bytes)}

        return self._patiently(folder, "read", read) if names else {}

    def sizes(self, folder: str) -> dict[str, int]:
        """The names of the files in a folder, each with its bytes; none where there is no folder."""

        def look(system: Any, path: str) -> dict[str, int]:
            system.invalidate_cache()
            try:
                entries = system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

        return self._patiently(folder, "read", look)

    def size(self, name: str) -> int | None:
        """The bytes of a file, None where there is none."""

        def look(system: Any, path: str) -> int:
            system.invalidate_cache()
            return int(system.info(path)["size"])

        try:
            return self._patiently(name, "read", look)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

        def remove(system: Any, path: str) -> None:
            system.invalidate_cache()
            if system.exists(path):
                system.rm_file(path)

        self._patiently(name, "removed", remove)

    def remove_leftovers(self, folder: str) -> None:
        """Remove what writers that were killed left in a folder, as far as can be known."""
        for name in self.sizes(folder):
            if is_leftover(name):
                self.remove(f"{folder}/{name}" if folder else name)

    def _patiently(self, name: str, doing: str, work: Callable[[Any, str], T]) -> T:
        """What `work` returns for the file system and the path of `name`, tried again where it fails in passing."""
        url, pauses = self.place(name), iter(PAUSES)
        while True:
            try:
                return work(*reach(url))
            except ConfigError:
                raise
            except Exception as error:  # each client raises its own kinds
                if isinstance(error, FileNotFoundError) and doing == "read":
                    raise
                forget_connection(url)
                pause = next(pauses, None)
                if pause is None or isinstance(error, FINAL):
                    raise StoreError(url, error, doing) from error
                logger.warning('"%s" could not be %s: %s; trying again in %g s', url, doing, reason_of(error), pause)
                time.sleep(pause)


def reach(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and its path there. Raises ConfigError where none is installed for its kind."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        module = str(known_implementations.get(protocol, {}).get("class", protocol)).partition(".")[0]
        extra = "http" if protocol == "https" else protocol
        package = f'"fsspec[{extra}]"' if module == "fsspec" else module
        raise ConfigError(f"'{url}' cannot be reached: {error}", f"pip install {package}") from error
    except ValueError as error:
        hint = "Check the URL; the kinds that fsspec knows: s3://, gs://, abfs://, sftp://, file:// and more"
        raise ConfigError(f"'{url}' cannot be reached: {error}", hint) from error


def forget_connection(url: str) -> None:
    """Let the next `reach` connect anew: fsspec keeps its file systems, whatever became of their connections."""
    from fsspec import get_filesystem_class

    get_filesystem_class(url.partition("://")[0]).clear_instance_cache()


def protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def rename(system: Any, source: str, target: str) -> None:
    """Move a file within a store, in place of an older one."""
    try:
        system.mv(source, target)
    except Exception:
        if not system.exists(target):
            raise
        system.rm_file(target)  # some move no file over another
        system.mv(source, target)


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def hint_for(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "Check the credentials, as fsspec and the store's own package find them, and what they permit"
    if isinstance(error, NotImplementedError):
        return "This kind of URL is only read: choose a store that takes files, such as s3://bucket/folder"
    if isinstance(error, FINAL):
        return "Check the URL: its bucket or folder must be there"
    return (
        "Check the network, the credentials, and the store's room; the same command goes on: what is finished is kept"
    )
