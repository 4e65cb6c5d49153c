import os
import signal
import subprocess
import sys

import pytest

from instaflow.interruption import SIGNALS, listening

SCRIPT = """
import sys, time
from instaflow.interruption import listening

with listening() as stop:
    print("listening", flush=True)
    while True:
        line = sys.stdin.readline().strip()
        if line == "end":
            break
        print(line, stop(), stop.signal, flush=True)
print("deaf", flush=True)
time.sleep(60)
"""


class Worker:
    """A process that listens, and tells when asked what it has heard."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.read() == "listening"

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.process.kill()
    worker.process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks(worker, number):
    assert worker.tell("before") == "before False None"
    worker.send(number)
    assert worker.tell("after") == f"after True {number.name}"


def test_a_second_interrupt_insists(worker):
    worker.send(signal.SIGINT)
    worker.tell("heard")
    worker.send(signal.SIGINT)
    code, err = worker.end()
    assert code == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_a_second_interrupt_insists_with_a_termination_between(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.send(number)
        assert worker.tell("now") == "now True SIGINT"
    worker.send(signal.SIGINT)
    assert worker.end()[0] == -signal.SIGINT


def test_terminations_never_insist(worker):
    for _ in range(3):
        worker.send(signal.SIGTERM)
        assert worker.tell("now") == "now True SIGTERM"
    worker.send(signal.SIGINT)  # the first of its kind
    assert worker.tell("now") == "now True SIGTERM"


def test_after_the_block_a_signal_ends_the_process_as_ever(worker):
    assert worker.tell("end") == "deaf"
    worker.send(signal.SIGTERM)
    assert worker.end()[0] == -signal.SIGTERM


def test_the_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before
