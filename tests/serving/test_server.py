"""What a server bears: connections on which nobody asks, too many of them, slow bodies, headers that lie."""

import socket
import threading
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import parse_qs, urlsplit

import pytest

from instaflow.serving import app, connection
from instaflow.serving import server as serving
from tests.serving.made import HeldBack, served, soon

HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


@pytest.fixture
def painter():
    return HeldBack()


def is_closed(end: socket.socket, more: bytes) -> bool:
    """Whether the server has closed a connection, on which otherwise `more` is sent."""
    end.settimeout(0.05)
    try:
        return not end.recv(10_000)
    except TimeoutError:
        end.sendall(more)
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    ("first", "more"),
    [("", b""), ("GET / HT", b"x"), (HEAD.format("/nowhere"), b"x")],
    ids=["silent", "half a head", "a body after its answer"],
)
def test_a_connection_on_which_nobody_asks_is_closed(painter, monkeypatch, first, more):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with served(painter) as server, socket.create_connection(("127.0.0.1", server.port)) as idle:
        idle.sendall(first.encode())
        soon(lambda: is_closed(idle, more))


def test_an_answer_may_take_its_time_and_the_next_request_comes_on_the_same_connection(painter, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with served(painter) as server, closing(HTTPConnection("127.0.0.1", server.port, timeout=30)) as asking:
        asking.connect()
        asking.auto_open = 0
        threading.Timer(0.7, painter.let_go).start()
        for _ in range(2):
            asking.request("POST", "/api/images", b'{"prompt": "x"}', {"Content-Type": "application/json"})
            assert asking.getresponse().read() == b"x"


def test_more_connections_than_a_server_has_are_told_so(painter, monkeypatch):
    monkeypatch.setattr(serving, "CONNECTIONS", 2)
    with served(painter) as server:
        assert server.ask(path="/api/health").status == 200
        with socket.create_connection(("127.0.0.1", server.port)):
            assert server.ask(path="/api/health").status == 503
        soon(lambda: server.ask(path="/api/health").status == 200)


def test_a_body_that_does_not_come_is_not_waited_for(painter, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with served(painter) as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as asking:
        asking.sendall(HEAD.format("/api/images").encode())
        assert b" 408 " in asking.recv(10_000).splitlines()[0]


def test_a_header_does_not_say_where_a_request_comes_from(painter):
    with served(painter) as server:
        answer = server.ask(path="/api/models/", X_Forwarded_Proto="https")
    assert answer.headers["location"] == f"{server.url}api/models"


def test_any_token_is_read_from_the_address_that_is_printed(painter):
    token = "ab+cd/ef==&g#h %20i?"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = serving.url_of(taken, token)
    assert parse_qs(urlsplit(url).query) == {"token": [token]}
    with served(painter, token) as server:
        assert server.ask(path=f"/?{urlsplit(url).query}").status == 303
