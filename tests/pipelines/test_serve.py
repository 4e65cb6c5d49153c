"""`instaflow serve` from its start to its end."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.models.made import write_model
from tests.pipelines.runs import command, environment


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "student" / "model", num_steps=1, guidance_scale=1.0)


class Serving:
    """The command in a process of its own, once it has said where it is."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            command("serve", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert self.process.stdout
        self.said = ""
        while "Open " not in self.said:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.said += line
        self.url = re.search(r"Open (http://\S+)", self.said)[1]  # type: ignore[index]

    def end(self, number):
        """Exit code, seconds that it took, and what was said to the end."""
        began = time.monotonic()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, time.monotonic() - began, out + err


def ask(url: str, **body: object) -> bytes:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as got:
        content: bytes = got.read()
    return content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_draws_until_it_is_told_to_stop(place, number):
    serving = Serving(place, "--port", "0")
    assert "student: teacher, 16×16 pixels" in serving.said
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", serving.url)
    assert ask(f"{serving.url}api/images", prompt="a seven").startswith(b"\x89PNG")
    code, seconds, out = serving.end(number)
    assert (code, out.strip()) == (0, "Stopped")
    assert seconds < 10


def test_it_stops_in_the_middle_of_a_long_drawing(place):
    serving = Serving(place, "--port", "0")
    with socket.create_connection(("127.0.0.1", int(serving.url.rstrip("/").rpartition(":")[2]))) as asking:
        body = b'{"prompt": "a seven", "num_steps": 200, "guidance_scale": 2}'
        head = "POST /api/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        asking.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while not json.load(urllib.request.urlopen(f"{serving.url}api/health"))["waiting"]:
            time.sleep(0.01)
        code, seconds, _ = serving.end(signal.SIGINT)
        assert b"503" in asking.recv(1000).splitlines()[0]
    assert code == 0 and seconds < 10


def test_an_address_of_other_machines_has_a_token(place):
    serving = Serving(place, "--port", "0", "--host", "0.0.0.0")
    try:
        port, token = re.fullmatch(
            rf"http://{re.escape(socket.gethostname())}:(\d+)/\?token=(\S+)", serving.url
        ).groups()
        assert len(token) >= 32
        address = f"http://127.0.0.1:{port}/api/health"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}", "Host": "any.name"})
        assert json.load(urllib.request.urlopen(asked))["status"] == "ok"
    finally:
        serving.end(signal.SIGTERM)


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(typed, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = typed("serve", tmp_path / "none", "--port", port)
    assert code == 1
    assert err.startswith(f"Error: Port {port} of 127.0.0.1 cannot be had: Address already in use")
    assert "--port 0" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "no.such.host.invalid"], "'--host' 'no.such.host.invalid' is no address of this machine"),
        (["--token", "short"], "'--token' must have 16 characters or more"),
        (["--token", "ä" * 20], "'--token' must have"),
        (["--port", "0"], "none"),
    ],
)
def test_what_cannot_be_served_is_an_error(typed, tmp_path, words, message):
    code, _, err = typed("serve", tmp_path / "none", *words)
    assert code == 1
    assert message in err and "Hint: " in err


def test_the_packages_that_it_wants_are_named(typed, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "instaflow.serving.server", raising=False)
    monkeypatch.delattr("instaflow.serving.server", raising=False)  # where another test has loaded it
    code, _, err = typed("serve", tmp_path)
    assert code == 1
    assert "wants the package 'uvicorn'" in err and "pip install starlette uvicorn" in err
