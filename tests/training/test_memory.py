"""What `instaflow plan` says that a training holds, against what a real engine holds."""

import pytest
import torch
from torch import nn

from instaflow.cost import BUCKET, training_memory
from instaflow.sections import Phase
from instaflow.stages import TrainingStage
from instaflow.training.engine import MOMENTS, Engine


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_holds_what_the_plan_says(stage):
    phases = [Phase(samples=8, global_batch_size=4, learning_rate=1e-3)]
    settings = TrainingStage(phases=phases, zero_stage=stage)
    engine = Engine(Squares(), settings, (4, 4))
    planned = training_memory(settings, 2 * 64 * 64, frozen=0, activations=0, gpus=1)
    moments = size(engine.adamw.state[master][key] for master in engine.masters for key in MOMENTS)
    stepped = size(engine.masters) if stage else 0
    assert planned.optimizer == moments + stepped
    assert planned.average == size(engine.ema.averages)
    if stage:
        assert engine.deepspeed.optimizer.reduce_bucket_size == BUCKET
    else:
        assert planned.weights == size(engine.module.parameters())
    engine.close()
