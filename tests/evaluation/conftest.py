import socket

import pytest


@pytest.fixture(autouse=True)
def own_weights(tmp_path, monkeypatch):
    """The user's folder of weights stays as it is."""
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(tmp_path / "weights"))


@pytest.fixture
def no_network(monkeypatch):
    """Any connection is an error."""

    def refused(*words):
        raise AssertionError(f"a connection was tried: {words[1:]}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
