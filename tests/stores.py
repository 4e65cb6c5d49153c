"""Stores for the tests: one that is slow, fails and tears on demand, and a real FTP server."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem


class WeakStore(AbstractFileSystem):
    """`weak:///folder`: a folder of this machine, written in place and in pieces, where a move replaces nothing.

    `fault` is called with each operation's name, and with "tear" when half of a file is written: it may raise.
    A connection on which something failed is dead from then on, and fsspec keeps it.
    """

    protocol = "weak"
    delay: ClassVar[float] = 0.0  # seconds
    fault: ClassVar[Callable[[str], None]] = staticmethod(lambda operation: None)

    def _call(self, operation: str) -> None:
        if getattr(self, "is_dead", False):
            raise ConnectionError("the connection is closed")
        time.sleep(WeakStore.delay)
        try:
            WeakStore.fault(operation)
        except Exception:
            self.is_dead = True
            raise

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list:
        self._call("ls")
        return [self._entry(file) for file in Path(path).iterdir()]

    def info(self, path: str, **kwargs: Any) -> dict:
        self._call("info")
        return self._entry(Path(path))

    def _entry(self, file: Path) -> dict:
        return {"name": str(file), "size": file.stat().st_size, "type": "file" if file.is_file() else "directory"}

    def exists(self, path: str, **kwargs: Any) -> bool:
        self._call("exists")
        return Path(path).exists()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._call("read")
        return Path(path).read_bytes()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._call("write")
        Path(path).write_bytes(value[: len(value) // 2])
        self._call("tear")
        with open(path, "ab") as file:
            file.write(value[len(value) // 2 :])

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self._call("move")
        if Path(path2).exists():
            raise FileExistsError(path2)
        Path(path1).rename(path2)

    def rm_file(self, path: str) -> None:
        self._call("remove")
        Path(path).unlink()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._call("make")
        Path(path).mkdir(parents=True, exist_ok=exist_ok)


fsspec.register_implementation("weak", WeakStore, clobber=True)


@contextmanager
def ftp_server(folder: Path) -> Iterator[str]:
    """A real FTP server of this process for `folder`; the URL of what it serves."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    class Handler(FTPHandler):
        authorizer = DummyAuthorizer()

    Handler.authorizer.add_user("me", "secret", str(folder), perm="elradfmwMT")
    server = ThreadedFTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.05}, daemon=True)
    thread.start()
    fsspec.config.conf["ftp"] = {"password": "secret", "timeout": 5}  # as FSSPEC_FTP_PASSWORD says it
    try:
        yield f"ftp://me@127.0.0.1:{server.address[1]}"
    finally:
        server.close_all()
        thread.join(5)
