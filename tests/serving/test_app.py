"""What the API answers."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from instaflow.serving.app import BODY_SECONDS, PAGE
from instaflow.serving.connection import HEAD_SECONDS
from instaflow.serving.requests import LONGEST_BODY, LONGEST_PROMPT, MOST_IMAGES, MOST_STEPS
from instaflow.serving.server import CONNECTIONS
from instaflow.serving.turns import MOST
from tests.serving.made import HeldBack, served

ROOT = Path(__file__).parents[2]
JSON = "application/json"


@pytest.fixture(scope="module")
def server():
    painter = HeldBack()
    painter.let_go()
    with served(painter) as server:
        yield server


def test_models_are_told_with_what_they_take(server):
    first, second = server.ask(path="/api/models").json["models"]
    assert (first["name"], first["kind"], first["num_steps"], first["prompts"]) == ("fast", "student", 1, "text")
    assert (second["name"], second["guidance_scale"], second["max_tokens"]) == ("slow", 7.5, 10)


def test_one_image_is_a_file_with_its_facts_in_a_header(server):
    answer = server.ask({"prompt": "a seven", "seed": 4})
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == b"a seven"
    facts = json.loads(answer.headers["x-instaflow"])
    assert (facts["model"], facts["num_steps"], facts["truncated"]) == ("fast", 1, False)
    assert set(facts["seconds"]) == {"waiting", "drawing"}


def test_any_images_are_json_where_json_is_accepted(server):
    body = {"prompt": "é🙂", "seeds": [3, 4], "model": "slow", "num_steps": 2}
    found = server.ask(body, Accept=JSON).json
    assert (found["model"], found["prompt"], found["num_steps"]) == ("slow", "é🙂", 2)
    assert [image["seed"] for image in found["images"]] == [3, 4]
    assert {base64.b64decode(image["png"]).decode() for image in found["images"]} == {"é🙂"}
    way = server.ask({"prompt": "x", "seed": 1, "seed_to": 2, "position": 0.25}, Accept=JSON).json["images"][0]
    assert (way["seed"], way["seed_to"], way["position"]) == (1, 2, 0.25)


def test_several_images_are_no_file(server):
    assert server.ask({"prompt": "x", "seeds": [1]}).refusal[0] == 406


def test_a_model_that_is_not_here_names_the_nearest(server):
    answer = server.ask({"prompt": "x", "model": "fas"})
    assert answer.refusal == (422, "There is no model 'fas' here")
    assert answer.json["hint"] == "Did you mean 'fast'?"


@pytest.mark.parametrize("note", ["", "it is black"])
def test_what_else_is_to_be_known_of_an_image_is_told(note):
    painter = HeldBack(note=note)
    painter.let_go()
    with served(painter) as server:
        assert json.loads(server.ask({"prompt": "x"}).headers["x-instaflow"])["note"] == note
        assert server.ask({"prompt": "x"}, Accept=JSON).json["note"] == note


def test_a_body_that_is_not_json_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.ask(b'{"prompt": "x"}', Content_Type=kind).refusal[0] == 415
    assert server.ask(b'{"prompt": "x"}', Content_Type="application/json; charset=utf-8").status == 200


def test_a_body_that_is_too_long_is_refused(server):
    assert server.ask(b" " * LONGEST_BODY + b"{}").refusal[0] == 413
    assert server.ask(b'{"prompt": "x"}'.rjust(LONGEST_BODY)).status == 200


def test_what_is_not_there_is_told(server):
    assert server.ask(path="/../etc/passwd").refusal[0] == 404
    assert server.ask(path="/api/images").refusal == (405, "There is no 'GET /api/images'")
    assert server.ask({}, path="/api/models").refusal[0] == 405


def test_health_is_told(server):
    health = server.ask(path="/api/health").json
    assert (health["status"], health["waiting"], health["most_waiting"]) == ("ok", 0, 32)


@pytest.mark.parametrize("path", PAGE)
def test_the_pages_files_are_there_and_ask_for_nothing_elsewhere(server, path):
    answer = server.ask(path=path)
    assert answer.status == 200
    text = answer.content.decode().replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text


def test_the_limits_are_those_of_the_page_about_them():
    text = (ROOT / "docs" / "serve.md").read_text("utf-8")
    assert f"more than {LONGEST_BODY // 1024} KiB, did not come within {BODY_SECONDS:g} s" in text
    assert f"has {CONNECTIONS} connections" in text and f"headers come within {HEAD_SECONDS:g} s" in text
    assert f"up to {LONGEST_PROMPT:,} characters" in text and f"up to {MOST_IMAGES}, an image" in text
    assert f"1 to {MOST_STEPS} |" in text and f"{MOST} drawings wait" in text


def example(server, language, monkeypatch, tmp_path):
    """A code block of docs/serve.md, for this server and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "serve.md").read_text("utf-8").replace("http://127.0.0.1:8765/", server.url)
    return next(block for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if server.url in block)


def test_the_pages_example_in_python_works(server, monkeypatch, tmp_path, capsys):
    exec(example(server, "python", monkeypatch, tmp_path).replace('"student"', '"fast"'), {})
    assert {path.name for path in tmp_path.iterdir()} == {f"seven-{seed}.png" for seed in range(3)}
    assert "drawing" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_pages_example_for_a_terminal_works(server, monkeypatch, tmp_path):
    subprocess.run(example(server, "sh", monkeypatch, tmp_path), shell=True, check=True, capture_output=True)
    assert (tmp_path / "seven.png").read_bytes() == b"a handwritten seven"
