"""Whose turn it is, with a painter that is held back: what is dropped, what passes what, and what is too much."""

import threading

import pytest

from instaflow.errors import DataError
from instaflow.serving.turns import MOST, Turn
from tests.serving.made import Answer, HeldBack, Served, served, soon

JSON = "application/json"


@pytest.fixture
def painter():
    return HeldBack()


@pytest.fixture
def server(painter):
    with served(painter) as server:
        yield server


class Asking(threading.Thread):
    """A request beside the test."""

    def __init__(self, server: Served, prompt: str, model: str = "fast", client: str | None = None, **more: object):
        super().__init__()
        body = {"prompt": prompt, "model": model, **({"client": client} if client else {}), **more}
        self.answer: Answer | None = None
        self.work = lambda: server.ask(body)
        self.start()

    def run(self) -> None:
        self.answer = self.work()

    def status(self) -> int:
        self.join(30)
        assert self.answer
        return self.answer.status


def waiting(server: Served) -> int:
    return server.ask(path="/api/health").json["waiting"]


def queued(server: Served, *asked: str, **how: object) -> list[Asking]:
    """Requests one after the other, each of which has its turn before the next comes."""
    threads = []
    for prompt in asked:
        before = waiting(server)
        threads.append(Asking(server, prompt, **how))  # type: ignore[arg-type]
        soon(lambda before=before: waiting(server) > before)
    return threads


def test_a_newer_request_of_a_client_takes_the_place_of_one_that_waits(server, painter):
    busy, *_ = queued(server, "busy")
    (old,) = queued(server, "a s", client="tab")
    (other,) = queued(server, "another tab's", client="other")
    new = Asking(server, "a se", client="tab")
    assert old.status() == 409
    painter.let_go()
    assert [one.status() for one in (busy, new, other)] == [200, 200, 200]
    assert painter.steps == ["busy", "a se", "another tab's"]


def test_requests_without_a_client_are_all_drawn(server, painter):
    threads = queued(server, "one", "two", "three")
    painter.let_go()
    assert [one.status() for one in threads] == [200] * 3
    assert painter.steps == ["one", "two", "three"]


def test_a_short_drawing_under_way_is_drawn_to_its_end(server, painter):
    threads = queued(server, "a", "ab", client="tab")
    painter.let_go()
    assert [one.status() for one in threads] == [200, 200]


def test_a_long_drawing_is_given_up_for_a_newer_one(server, painter):
    (old,) = queued(server, "old", model="slow", client="tab")
    soon(lambda: painter.steps == ["old"])
    new = Asking(server, "new", model="slow", client="tab")
    assert old.status() == 409
    painter.let_go()
    assert new.status() == 200
    assert painter.steps == ["old", *["new"] * 25]


def test_the_two_models_of_a_client_do_not_replace_each_other(server, painter):
    threads = [*queued(server, "slow", model="slow", client="tab"), *queued(server, "fast", client="tab")]
    painter.let_go()
    assert [one.status() for one in threads] == [200, 200]


def test_a_short_drawing_does_not_wait_for_a_long_one(server, painter):
    (slow,) = queued(server, "slow", model="slow")
    soon(lambda: painter.steps == ["slow"])
    (fast,) = queued(server, "fast")
    painter.let_go()
    assert (fast.status(), slow.status()) == (200, 200)
    assert painter.steps == ["slow", "fast", *["slow"] * 24]


def test_more_than_the_most_are_told_to_come_again(server, painter):
    threads = queued(server, *map(str, range(MOST)))
    answer = server.ask({"prompt": "one more"})
    assert answer.refusal[0] == 429
    assert answer.headers["retry-after"] == "1"
    painter.let_go()
    assert {one.status() for one in threads} == {200}
    assert server.ask({"prompt": "later"}).status == 200


def test_those_that_wait_are_told_when_the_server_is_stopped(painter):
    with served(painter) as server:
        threads = queued(server, "under way", "waiting")
        server.stop.signal = "SIGTERM"
        assert [one.status() for one in threads] == [503, 503]
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_a_drawing_is_given_up_when_the_one_who_asked_goes(server, painter):
    import socket

    gone = socket.create_connection(("127.0.0.1", server.port))
    body = b'{"prompt": "gone", "model": "slow"}'
    head = (
        f"POST /api/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    gone.sendall(head.encode() + body)
    soon(lambda: painter.steps == ["gone"])
    gone.close()
    soon(lambda: waiting(server) == 0)
    painter.let_go()
    assert server.ask({"prompt": "next"}).status == 200
    assert painter.steps == ["gone", "next"]


def test_what_cannot_be_drawn_is_the_requests_fault_and_others_go_on(server, painter):
    painter.let_go()
    painter.fault = DataError("'dgo' is no class", "Try 'dog'")
    answer = server.ask({"prompt": "dgo"})
    assert (answer.status, answer.json) == (422, {"error": "'dgo' is no class", "hint": "Try 'dog'"})
    painter.fault = RuntimeError("broken")
    assert server.ask({"prompt": "x"}).refusal == (500, "The drawing failed")
    painter.fault = None
    assert server.ask({"prompt": "x"}).status == 200
    assert waiting(server) == 0


def test_times_are_told(server, painter):
    painter.let_go()
    seconds = server.ask({"prompt": "x", "model": "slow"}, Accept=JSON).json["seconds"]
    assert 0 < seconds["drawing"] < 10 and 0 < seconds["waiting"] < 10


def test_a_long_drawing_lets_short_ones_pass_for_a_while_alone():
    def due(steps: int, came: float) -> float:
        return Turn(None, steps, None, None, place=came).due()  # type: ignore[arg-type]

    long = due(25, 0.0)
    assert due(1, 2.3) < long < due(1, 2.5)
