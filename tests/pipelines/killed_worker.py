"""The `instaflow` command, which kills itself at a place of a watch: $KILL is what it is about to do, the how manieth.

The batches that it wrote before stand in the file $BATCHES.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import cli
from instaflow.evaluation.observations import Observations
from pipelines import watching

about_to, _, at = os.environ["KILL"].partition(" ")
PLACES = {"batch": (Observations, "write"), "line": (watching, "append_stats"), "clear": (watching.shutil, "rmtree")}


def killed(do: Callable, counted: list[Any]) -> Callable:
    def done_unless_killed(*words: Any) -> None:
        counted.append(words)
        if len(counted) == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        do(*words)

    return done_unless_killed


def noted(self: Observations, batch: slice, *words: Any) -> None:
    write(self, batch, *words)
    with open(os.environ["BATCHES"], "a") as file:
        file.write(f"{self._file(batch)}\n")


if __name__ == "__main__":
    write, Observations.write = Observations.write, noted
    place, name = PLACES[about_to]
    setattr(place, name, killed(getattr(place, name), []))
    cli.main()
