"""Servers on a free port of this process, and a painter that a test holds back."""

import http.client
import json
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from instaflow.interruption import Stop
from instaflow.serving.painter import Images, Offer, Painter
from instaflow.serving.requests import ImageRequest
from instaflow.serving.server import bound, serve


@dataclass
class HeldBack:
    """A painter of a fast model and a slow one, each of whose steps waits until the test lets it go."""

    may: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: list[str] = field(default_factory=list)
    """The prompts of the steps that were begun."""
    fault: Exception | None = None
    image: bytes = b""
    """What all is answered by; otherwise by the prompt."""
    note: str = ""
    offers: tuple[Offer, ...] = (
        Offer("fast", "student", 1, 1.0, "text", [], 8, 8, 10),
        Offer("slow", "teacher", 25, 7.5, "text", [], 8, 8, 10),
    )

    def draw(self, model: str, asked: ImageRequest) -> Generator[None, None, Images]:
        steps = asked.num_steps or {"fast": 1, "slow": 25}[model]
        for number in range(steps):
            self.steps.append(asked.prompt)
            self.may.acquire()
            if self.fault:
                raise self.fault
            if number < steps - 1:
                yield
        scale = {"fast": 1.0, "slow": 7.5}[model] if asked.guidance_scale is None else asked.guidance_scale
        image = self.image or asked.prompt.encode()
        return Images([image] * len(asked.many), steps, scale, truncated=False, note=self.note)

    def let_go(self, steps: int = 10**6) -> None:
        self.may.release(steps)


@dataclass
class Served:
    """A server at a port."""

    port: int
    stop: Stop
    thread: threading.Thread
    address: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}/"

    def ask(self, body: Any = None, path: str = "/api/images", method: str = "", **headers: str) -> "Answer":
        """One request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.address, self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, content, kind | named)
        got = connection.getresponse()
        answer = Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        connection.close()
        return answer


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def refusal(self) -> tuple[int, str]:
        assert set(self.json) == {"error", "hint"}
        return self.status, self.json["error"]


@contextmanager
def served(painter: Painter, token: str | None = None, *, address: str = "127.0.0.1") -> Iterator[Served]:
    """A server in a thread, ended with the block. It was started with the host My.Name, which leads to `address`."""
    stop, taken = Stop(), bound(address, 0)
    worker = ThreadPoolExecutor(1)
    options = {"host": "My.Name", "token": token, "stop": stop}
    thread = threading.Thread(target=serve, args=(painter, worker, taken), kwargs=options)
    thread.start()
    try:
        yield Served(taken.getsockname()[1], stop, thread, address)
    finally:
        if isinstance(painter, HeldBack):
            painter.let_go()
        stop.signal = "SIGTERM"
        thread.join(30)
        worker.shutdown()
        assert not thread.is_alive()


def soon(condition: Any) -> None:
    """Wait until it is so."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
