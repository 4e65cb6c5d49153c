"""How the tests share the cores, and what several files share: a typed command, the digits runs, whole and small."""

import fcntl
import os
import socket
import sys
from pathlib import Path

import pytest

import cli
from tests.pipelines.runs import CONFIG, cut_to_a_tenth, instaflow

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # its cores are its own: busy threads on shared ones wait and wait
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % count % len(cores) :: count])

LONGEST = (
    "pipelines/test_digits.py",
    "pipelines/test_rehearse.py",
    "pipelines/test_slurm.py",
    "pipelines/test_evaluate.py",
    "pipelines/test_resuming.py",
    "pipelines/test_dmd.py",
    "benchmarks/test_train.py",
    "training/test_zero.py",
    "training/test_kills.py",
)
"""The files that take minutes, the longest first."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each core, 3 GiB of memory and file, at most eight; none, but this process, for one file."""
    named = {argument.partition("::")[0] for argument in config.args}
    files = len(named) if all(name.endswith(".py") for name in named) else 8
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = min(len(os.sched_getaffinity(0)), memory // (3 * 2**30), files, 8)
    return count if count > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none of them is what the other workers wait for."""
    tests = Path(__file__).parent
    places = {tests / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command; returns its exit code, output and errors."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["instaflow", *map(str, words)])
        monkeypatch.setattr("instaflow.world.leave", lambda: False)  # DeepSpeed can't go on in a process that has
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
    """The same with every count cut to a tenth; tests copy what they change.

    Of all workers of these tests that have as many cores, and so the same bits, one makes it, and the others wait.
    """
    place = tmp_path_factory.getbasetemp()
    place = place.parent if worker else place
    run = place / f"small-{len(os.sched_getaffinity(0))}" / "digits"
    run.parent.mkdir(exist_ok=True)
    with open(run.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        instaflow("run", CONFIG, "--run-dir", run, *cut_to_a_tenth())  # which is done at once the second time
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
