"""Commands in forks of a process that has the libraries loaded, which takes a fresh interpreter ten seconds and more.

What is loaded there are libraries alone. A fork runs its module as `python -m` does, with a process id, signals, open
files, a folder and an environment of its own, and ends as the interpreter ends.
"""

import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

LIBRARIES = """
import sklearn.datasets, torch, torch._dynamo, webdataset
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizerFast
"""


class Started:
    """A command that runs or ran: what `subprocess.Popen` tells of one, its output in files."""

    def __init__(self, module: str, *arguments: str, cwd: Path, environment: dict[str, str]) -> None:
        self.folder, self.arguments = Path(tempfile.mkdtemp(prefix="command-")), arguments
        request = {"module": module, "arguments": arguments, "cwd": str(cwd), "environment": environment}
        server = ready_server()
        assert server.stdin
        server.stdin.write(json.dumps({**request, "folder": str(self.folder)}) + "\n")
        server.stdin.flush()
        while not (self.folder / "pid").exists():
            assert server.poll() is None, "the process that is forked has ended"
            time.sleep(0.005)
        self.pid = int((self.folder / "pid").read_text())

    def poll(self) -> int | None:
        """Its exit code, less than 0 for the signal that ended it; None while it runs. Not for after `ended`."""
        code = self.folder / "code"
        return int(code.read_text()) if code.exists() else None

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ended(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises TimeoutError."""
        deadline = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"it did not end within {timeout} s: {self.arguments}\n{self.told('err')[-3000:]}")
            time.sleep(0.02)
        done = subprocess.CompletedProcess(self.arguments, code, self.told("out"), self.told("err"))
        shutil.rmtree(self.folder)
        return done

    def told(self, name: str) -> str:
        file = self.folder / name  # which a fork that has just begun has not opened yet
        return file.read_text(encoding="utf-8") if file.exists() else ""


@cache
def ready_server() -> subprocess.Popen[str]:
    """The process that is forked, one of each that runs tests; it ends when this one does, for its input does."""
    words = [sys.executable, "-m", "tests.pipelines.started"]
    return subprocess.Popen(words, stdin=-1, text=True, cwd=Path(__file__).parents[2], start_new_session=True)


def serve() -> None:
    """Fork for each line of the standard input."""
    logging.disable(logging.WARNING)
    exec(LIBRARIES, {})
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    for line in sys.stdin:
        request = json.loads(line)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(request)
            break


def keep(request: dict) -> None:
    """Fork the command; tell its process id, and then its exit code."""
    if pid := os.fork():
        tell(request, "pid", pid)
        tell(request, "code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    run(request)


def tell(request: dict, name: str, number: int) -> None:
    new = Path(request["folder"]) / "new"
    new.write_text(str(number))
    new.rename(new.with_name(name))


def run(request: dict) -> None:
    """What `python -m module arguments` does."""
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT) for name in ("out", "err")]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["", *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
