"""A network that trains in a moment, and the job and folder around it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.rundir import StageFolder
from instaflow.sections import Phase
from instaflow.stages import TrainingStage
from instaflow.training.loop import Job

PHASES = [
    Phase(samples=30, global_batch_size=4, learning_rate=1e-2, warmup_samples=8),  # 7 batches; 2 samples are left over
    Phase(samples=32, global_batch_size=8, learning_rate=4e-3, schedule="cosine"),
]
STEPS = 7 + 4
TOTAL = 28 + 32
TIMINGS = ("seconds", "samples_per_second", "peak_memory_gib")


class Fit(nn.Module):
    """Mean squared error of a small network on disturbed inputs; it remembers the draws that it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.draws: list[np.ndarray] = []

    def forward(self, x: Tensor, y: Tensor, draws: np.ndarray) -> Tensor:
        self.seen += len(x)
        self.draws.append(draws)
        disturbed = x + torch.from_numpy(draws[:, :1]).float()
        return (self.net(disturbed) - y).square().mean()


def batch(position: int, size: int) -> tuple[Tensor, Tensor]:
    """Samples that depend on their position alone."""
    place = torch.arange(position, position + size).float()[:, None]
    x = torch.sin(place * torch.tensor([1.0, 2.0, 3.0]))
    return x, torch.cos(place * torch.tensor([0.7, 1.9])) * 3


def job_of(loss: nn.Module, **changes) -> Job:
    keys = {
        "name": "fit",
        "loss": loss,
        "batch": batch,
        "describe": lambda position, size: f"samples {position} to {position + size - 1}",
        "phases": PHASES,
        "by_time": None,
        "begin": None,
        "preview_every": None,
        "preview": None,
    }
    settings = {
        "ema_decay": 0.7,
        "adam_beta2": 0.99,
        "gradient_clipping": 2.5,  # some steps are clipped, some not
        "checkpoint_every": 10**9,
    }
    for key, value in changes.items():
        (keys if key in keys else settings)[key] = value
    return Job(**keys, settings=TrainingStage(phases=keys["phases"], **settings))


def folder_of(run: Path, seed: int = 0) -> StageFolder:
    folder = StageFolder(run, "2rf", SimpleNamespace(kind="reflow"), seed, ("2rf",), "digits.yaml")
    folder.folder.mkdir(parents=True, exist_ok=True)
    folder.start_clock()
    return folder


class StopAt:
    """Says stop when it is asked for the time `step`, counted from 0, once a step."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.asked, self.signal = step, -1, None

    def __call__(self) -> bool:
        self.asked += 1
        if self.asked == self.step:
            self.signal = "SIGTERM"
        return self.signal is not None


def figures(folder: StageFolder) -> list[dict]:
    """The lines of stats.jsonl without the time and memory that they took."""
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in folder.stats()]
