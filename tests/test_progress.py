import os
import pty
import re
import subprocess
import sys

import pytest

from instaflow import progress
from instaflow.progress import Progress

SCRIPT = """
import sys
from instaflow.progress import Progress
label = "teacher autoencoder" if sys.stdout.isatty() else "pairs"
with Progress(label, total=4096, unit="couplings", start=1024) as progress:
    for done in (2048, 4096):
        progress.update(done, loss=0.125)
"""


def test_off_a_terminal_the_last_line_tells_the_whole(capsys):
    with Progress("pairs", total=4096, unit="couplings") as progress:
        progress.update(4096)
    assert re.fullmatch(r"pairs: 4,096 couplings in [0-9.]+ s\n", capsys.readouterr().out)


def test_off_a_terminal_plain_lines_tell_rate_time_left_and_figures(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("2rf", total=3000, unit="samples", start=1000) as work:
        work.update(1100, loss=0.5)  # 4 s: too soon
        work.update(1500, loss=0.25, rate=1)  # 10 s
        work.update(1600)  # 12 s: too soon again
        work.update(2000)  # 20 s
    assert capsys.readouterr().out.splitlines() == [
        "2rf: 1,500/3,000 samples, 50/s, 30 s left  loss 0.2500  rate 1.0000",
        "2rf: 2,000/3,000 samples, 50/s, 20 s left",
        "2rf: 1,000 more, now 2,000 samples in 30.0 s",
    ]


def test_quiet_says_nothing(capsys):
    with Progress("pairs", total=2, unit="couplings", quiet=True) as work:
        work.update(2, loss=1.0)
    assert capsys.readouterr().out == ""
    assert work.done == 2


def test_work_that_failed_is_not_called_done(capsys):
    with pytest.raises(RuntimeError), Progress("pairs", total=2, unit="couplings") as work:
        work.update(1)
        raise RuntimeError
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", ["80", "160"])
def test_on_a_terminal_a_live_line_shows_bar_rate_and_figures(columns):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": columns}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    text = shown.decode()
    assert process.wait() == 0, text
    assert "\x1b[" in text  # it draws over itself
    assert "4,096/4,096" in text
    assert "…" not in text
    assert "loss 0.1250" in text
    assert re.search(r"[0-9,]+ couplings/s", text)
    assert re.search(r"[0-9]+:[0-9]+\x1b\[0m left", text)
    assert "couplings in " not in text  # the plain line


def test_to_a_pipe_no_control_codes_go():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"pairs: 3,072 more, now 4,096 couplings in [0-9.]+ s\n", done.stdout)
