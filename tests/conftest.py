"""What several test files share: a typed command, one whole digits run, and one with its counts cut to a tenth."""

import socket
import sys
from pathlib import Path

import pytest

import cli
from tests.pipelines.runs import CONFIG, cut_to_a_tenth, instaflow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Commands first: they take connections down at their end, and after that DeepSpeed can't go on in one process."""
    items.sort(key=lambda item: "typed" not in getattr(item, "fixturenames", ()) and item.path.name != "test_cli.py")


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command; returns its exit code, output and errors."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["instaflow", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`instaflow run configs/digits.yaml`, from nothing to the report."""
    run = tmp_path_factory.mktemp("whole") / "digits"
    instaflow("run", CONFIG, "--run-dir", run)
    return run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every count cut to a tenth; tests copy what they change."""
    run = tmp_path_factory.mktemp("small") / "digits"
    instaflow("run", CONFIG, "--run-dir", run, *cut_to_a_tenth())
    return run


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error."""
    forbid_network(monkeypatch)


def forbid_network(patch: pytest.MonkeyPatch) -> None:
    def refused(*words):
        raise AssertionError(f"a connection was tried: {words[1:]}")

    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, refused)
    patch.setattr(socket, "getaddrinfo", refused)
