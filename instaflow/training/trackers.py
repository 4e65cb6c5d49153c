"""Where the figures of a training go besides stats.jsonl."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instaflow.errors import InstaFlowError
from instaflow.files import write_json
from instaflow.rundir import read_json


class Trackers:
    """TensorBoard's and Weights & Biases' copies of the figures, by samples seen; made by the leading process alone."""

    def __init__(self, names: Sequence[str], folder: Path, job: str, position: int) -> None:
        self.board: Any = None
        self.run: Any = None
        self.prefix = f"{job}/" if job else ""
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            # What was written past the position, before a kill, is hidden.
            self.board = SummaryWriter(str(folder / "tensorboard" / job), purge_step=position + 1)
        if "wandb" in names:
            self.run = wandb_run(folder)

    def log(self, position: int, figures: dict[str, Any]) -> None:
        """Take in a line's numbers; a list goes by its items' places."""
        numbers: dict[str, float] = {}
        for name, value in figures.items():
            items = {f"{name}/{place}": item for place, item in enumerate(value)} if isinstance(value, list) else None
            numbers |= {key: item for key, item in (items or {name: value}).items() if item is not None}
        if self.board:
            for name, number in numbers.items():
                self.board.add_scalar(name, number, position)
        if self.run:
            self.run.log({"samples_seen": position, **{self.prefix + name: number for name, number in numbers.items()}})

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()


def wandb_run(folder: Path) -> Any:
    """The stage's run at Weights & Biases, the same one after an interruption. Raises InstaFlowError.

    Account, project and mode are wandb's own to know (`wandb login`, WANDB_PROJECT, WANDB_MODE).
    """
    import wandb

    file = folder / "wandb.json"
    known = read_json(file)["id"] if file.is_file() else uuid.uuid4().hex[:8]
    write_json(file, {"id": known})
    try:
        run = wandb.init(dir=folder, id=known, resume="allow", name=f"{folder.parent.name}/{folder.name}")
    except wandb.errors.Error as error:
        raise InstaFlowError(
            f"Stage '{folder.name}': Weights & Biases does not take the figures: {error}",
            "`wandb login` once, or set WANDB_MODE=offline and `wandb sync` later; or leave it out of trackers",
        ) from error
    run.define_metric("*", step_metric="samples_seen")
    return run
