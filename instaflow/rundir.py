"""A run on disk: one self-contained folder a stage, with identity, lock, done mark and figures.

RUN/STAGE/stage.json    what the stage is: its settings, seed, and the content of its parents
RUN/STAGE/state.json    where it stands: running, interrupted, failed, unfinished (others' work is left) or done
RUN/STAGE/done.json     written last: the payload's fingerprint, seconds
RUN/STAGE/stats.jsonl   figures over time, one JSON object a line
"""

import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instaflow.config import Experiment
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.files import fingerprint_of, json_text, listing_hash, sha256_of, write_file, write_json, write_new
from instaflow.image_files import images_exist, images_hash
from instaflow.methods import DmdStage
from instaflow.places import cached_model, is_hub_name, model_fingerprint
from instaflow.prompt_sources import content_of, exists
from instaflow.stages import CoupleStage, EvaluateStage
from instaflow.world import ALONE, Worker

FORMAT = 1
PLACES = ("model", "init", "teacher", "couplings", "real", "features", "network", "weights", "decoder")
"""The settings that may name a folder, a file or a hub model."""


@dataclass
class StageFolder:
    """One stage of a run and its folder."""

    run: Path
    name: str
    stage: Any  # the Stage subclass of its kind
    seed: int
    stage_names: tuple[str, ...]
    source: str
    overrides: tuple[str, ...] = ()
    worker: Worker = ALONE
    started: float = 0.0

    @property
    def folder(self) -> Path:
        return self.run / self.name

    @property
    def model(self) -> Path:
        """The folder of the stage's final model."""
        return self.folder / "model"

    @property
    def stats_file(self) -> Path:
        return self.folder / "stats.jsonl"

    def command(self) -> str:
        """What to type to run or resume this stage."""
        changes = [word for override in self.overrides for word in ("--set", override)]
        options = ["--run-dir", str(self.run), "--stage", self.name, *changes]
        if isinstance(self.stage, CoupleStage):
            options += self.worker.options()
        return shlex.join(["instaflow", self.stage.kind, self.source, *options])

    def locate(self, parent: str) -> str:
        """A parent's payload: a stage's model folder or the stage's folder, or the folder or hub name as it stands."""
        if parent not in self.stage_names:
            return parent
        folder = self.run / parent
        return str(folder / "model" if (folder / "model").is_dir() else folder)

    def locate_weights(self, parent: str, weights: str) -> str:
        """A model with its moving average, weights "ema", or with its "raw" ones. Raises ConfigError if it has none."""
        if weights == "ema":
            return self.locate(parent)
        folder = Path(self.locate(parent))
        raw = folder.with_name("model-raw")
        if folder.name != "model" or not raw.is_dir():
            raise ConfigError(
                f"Stage '{self.name}': '{parent}' has no raw weights: there is no '{raw}' beside a folder 'model'",
                "Training stages of this toolkit leave both; for any other model leave out weights: raw",
            )
        return str(raw)

    def locate_network(self, parent: str) -> Path:
        """The folder of a perceptual network: a teacher stage's, or the folder itself."""
        return self.run / parent / "perceptual" if parent in self.stage_names else Path(parent)

    def relative(self, parent: str) -> str:
        """A parent's payload as this stage's folder sees it; a hub name as it stands."""
        place = self.locate(parent)
        return os.path.relpath(place, self.folder) if Path(place).exists() else place

    # --- identity -----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What decides this stage's result, its parents by content. Raises DataError if a parent is not there."""
        return {**self.own_identity(), **self.contents(self.stage.parents())}

    def own_identity(self) -> dict[str, Any]:
        """The identity less the parents' content, and less that of a done stage's prompts and files that are gone."""
        files = self.stage.files()
        outside = {*self.stage.parents().values(), *files.values()} - set(self.stage_names)
        settings = without_places(self.stage.identity(), outside)  # no path is part of an identity
        identity = {"format": FORMAT, "name": self.name, "seed": self.seed, **settings}
        if isinstance(self.stage, CoupleStage | DmdStage):
            identity |= self.source_content()
        if isinstance(self.stage, EvaluateStage) and self.stage.real and Path(self.stage.real).is_dir():
            identity["real (content)"] = listing_hash(Path(self.stage.real))
        for key, place in files.items():
            path = Path(place)
            if path.exists() or not self.is_done():
                identity[f"{key} (content)"] = fingerprint_of(path) if path.is_dir() else sha256_of(path)
        return identity

    def source_content(self) -> dict[str, str]:
        """The content of a stage's prompts, or of its real images; of a done stage's that are gone nothing."""
        prompts, data = self.stage.prompts, getattr(self.stage, "data", None)
        if data is not None:
            return {"data": images_hash(data)} if images_exist(data) or not self.is_done() else {}
        return {"prompts": content_of(prompts)} if exists(prompts) or not self.is_done() else {}

    def contents(self, parents: Mapping[str, str]) -> dict[str, str]:
        return {f"{key} (content)": self.content(parent) for key, parent in parents.items()}

    def content(self, parent: str) -> str:
        """The fingerprint of a parent: of a done stage, a folder, a single-file model, or a hub model's commit."""
        if parent in self.stage_names:
            return str(read_done(self.run / parent)["fingerprint"])
        return fingerprint_of(Path(parent)) if Path(parent).is_dir() else model_fingerprint(parent)

    def ancestry(self, parent: str) -> set[str]:
        """The contents of a model and of all that it was made from, as far as this run's stages tell."""
        found, waiting = {self.content(parent)}, [parent]
        while waiting:
            name = waiting.pop()
            file = self.run / str(name) / "stage.json"
            if name in self.stage_names and file.is_file():  # it may have been copied here without its own parents
                record = read_json(file)
                found |= {value for key, value in record["identity"].items() if key.endswith("(content)")}
                waiting += [record["settings"].get(key) for key in ("init", "teacher", "couplings", "model")]
        return found

    def is_here(self, parent: str) -> bool:
        """Whether a parent can be looked at: a stage that is done, or a model that needs no network."""
        if parent in self.stage_names:
            return (self.run / parent / "done.json").is_file()
        return not is_hub_name(parent) or cached_model(parent) is not None

    def is_done(self) -> bool:
        return (self.folder / "done.json").is_file()

    def changes(self) -> list[str]:
        """What is set otherwise than when the stage was begun, its parents' content included, in words.

        Parents that are not here don't count, nor do a done stage's files that are gone: the stage may have
        been copied into this run without them, and its folder holds what it needs.
        """
        file = self.folder / "stage.json"
        if not file.is_file():
            return []
        here, absent = {}, set()
        for key, parent in self.stage.parents().items():
            if not self.is_here(parent):
                absent.add(f"{key} (content)")
            else:
                here[key] = parent
        own = self.own_identity()
        absent |= {
            "prompts",
            "data",
            "real (content)",
            *(f"{key} (content)" for key in self.stage.files()),
        } - own.keys()
        old, new = flat(read_json(file)["identity"]), flat({**own, **self.contents(here)})
        return [
            f"'{key}' was {said(old, key)}, is now {said(new, key)}"
            for key in {**old, **new}
            if key not in absent and said(old, key) != said(new, key)
        ]

    def check_identity(self) -> None:
        """Refuse to go on with a stage that was begun with other settings or other parents. Raises ConfigError."""
        if not self.stage.remade and (changes := self.changes()):
            raise ConfigError(
                f"Stage '{self.name}' in '{self.run}' was made with other settings: {'; '.join(changes)}",
                f"Go back to the old value, choose another --run-dir, or delete '{self.folder}' to make it anew",
            )

    # --- work ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Check and record what this stage is."""
        self.check_identity()
        record = {"identity": self.identity(), "settings": self.stage.model_dump(mode="json")}
        if not write_new(self.folder / "stage.json", json_text(record)):
            self.check_identity()  # with who was first, perhaps another worker a moment ago
            write_json(self.folder / "stage.json", record)
        self.set_state("running")
        self.start_clock()

    def start_clock(self) -> None:
        """Count the seconds of work on this stage from now, those before an interruption included."""
        before = max((line.get("seconds", 0.0) for line in self.stats()), default=0.0)
        self.started = time.monotonic() - before

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def set_state(self, state: str, **facts: Any) -> None:
        write_json(self.folder / "state.json", {"state": state, **facts})

    def finish(self, fingerprint: str, **facts: Any) -> bool:
        """Mark the stage as done: the last file that it writes. False if another worker did so before."""
        self.set_state("done")
        mark = {"fingerprint": fingerprint, "seconds": self.seconds(), **facts}
        return write_new(self.folder / "done.json", json_text(mark))

    def log(self, **figures: Any) -> None:
        """Append one line to stats.jsonl, with the stage's seconds so far."""
        append_stats(self.stats_file, {**figures, "seconds": self.seconds()})

    def stats(self) -> list[dict[str, Any]]:
        return read_stats(self.stats_file)

    def forget_stats(self, keep: Any) -> None:
        """Drop the lines for which `keep(line)` is false: those past the state that work resumes from."""
        if self.stats_file.exists():
            lines = [line for line in self.stats() if keep(line)]
            write_file(self.stats_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold a stage's folder for this process, or together with others that share it so.

    The kernel drops the lock of a process that dies. The block is handed a function that tells, at its end, whether
    nobody else holds the folder. Raises InstaFlowError, which names who does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:

        def lock(kind: int) -> bool:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not lock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            file.seek(0)
            holder = file.read().strip() or "a process"
            raise InstaFlowError(
                f"Stage '{folder.name}' in '{folder.parent}' is being worked on by {holder}",
                "Wait for it, or stop it, then type the same command again",
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield lambda: lock(fcntl.LOCK_EX)


def stage_folders(experiment: Experiment, worker: Worker = ALONE) -> dict[str, StageFolder]:
    """Every stage of an experiment with its folder, in order, as this worker sees them."""
    names = tuple(experiment.stages)
    place, seed, source, overrides = Path(experiment.run), experiment.seed, experiment.source, experiment.overrides
    return {
        name: StageFolder(place, name, stage, seed, names, source, overrides, worker)
        for name, stage in experiment.stages.items()
    }


def read_stats(file: Path) -> list[dict[str, Any]]:
    """The lines of a stats.jsonl; a last line that a kill cut short does not count."""
    lines = []
    for text in file.read_bytes().split(b"\n") if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # no JSON, or cut inside a character
            continue
    return lines


def append_stats(file: Path, figures: Mapping[str, Any]) -> None:
    """Put one more line into such a file."""
    line = json.dumps(figures, ensure_ascii=False) + "\n"
    with open(file, "ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":  # a kill cut the last line short: it must not swallow this one
                line = "\n" + line
        lines.write(line.encode())


def read_json(file: Path) -> dict[str, Any]:
    """One of a stage's own files. Raises DataError if it is damaged."""
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise DataError(f"'{file}' is damaged: {error}", f"Delete '{file.parent}' to make the stage anew") from error
    return value


def without_places(value: Any, places: set[str]) -> Any:
    """A stage's settings without the folders and hub names in `places`; their content stands beside."""
    if isinstance(value, list):
        return [without_places(item, places) for item in value]
    if isinstance(value, dict):
        kept = {
            key: item for key, item in value.items() if not (key in PLACES and isinstance(item, str) and item in places)
        }
        return {key: without_places(item, places) for key, item in kept.items()}
    return value


def flat(value: dict[str, Any]) -> dict[str, Any]:
    """The same settings by dotted path, as `--set` names them."""
    found = {}
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(part, dict) for part in item):
            item = {str(index): part for index, part in enumerate(item)}
        if isinstance(item, dict):
            found.update({f"{key}.{below}": part for below, part in flat(item).items()})
        else:
            found[key] = item
    return found


def said(settings: dict[str, Any], key: str) -> str:
    """A setting's value as an error tells it; one that is null is as good as absent."""
    return "absent" if settings.get(key) is None else repr(settings[key])


def read_done(folder: Path) -> dict[str, Any]:
    """A stage's done mark. Raises DataError where there is none."""
    file = folder / "done.json"
    if not file.is_file():
        raise DataError(f"Stage '{folder.name}' in '{folder.parent}' is not done", "Run it first")
    return read_json(file)
