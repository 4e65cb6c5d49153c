"""AdamW with its moments in 8 bits, as torchao makes it, in the training loop."""

import shutil

import pytest
import torch
from torch import nn

from instaflow.errors import Interrupted
from instaflow.training.checkpoint import load_checkpoint
from instaflow.training.draws import draws
from instaflow.training.engine import Engine
from instaflow.training.loop import train
from tests.training.made import PHASES, Fit, StopAt, batch, figures, folder_of, job_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="torchao's step is compiled by g++"
    ),
]
torchao_optim = pytest.importorskip("torchao.optim", reason="the extra 8bit is not installed")


class Wide(Fit):
    """Some of its moments are large enough for 8 bits (4096 numbers and more), some are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def run(folder, stop=None, **changes):
    settings = {"optimizer": "adamw-8bit"} | changes
    return train(job_of(Wide(), **settings), folder_of(folder), stop or StopAt())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_the_loop_is_torchaos_adamw(whole):
    """But for rounding: the last bit of a gradient may turn a code over, which is some percent of that moment.

    Noise of 1e-7 in the gradients moves the weights with 8-bit moments by 0.2% of their way, the others by 0.01%;
    another decay, beta or rate (by 1%) moves the latter by 0.2% to 20%, moments of 32 bits the former by 1.9%.
    """
    loss = Wide()
    start = {name: value.clone() for name, value in loss.net.state_dict().items()}
    optimizer = torchao_optim.AdamW8bit(loss.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    position = 0
    lines = figures(folder_of(whole[0]))
    for phase in PHASES:
        for _ in range(phase.samples // phase.global_batch_size):
            optimizer.param_groups[0]["lr"].fill_(lines.pop(0)["learning_rate"])
            optimizer.zero_grad()
            size = phase.global_batch_size
            loss(*batch(position, size), draws(0, "2rf/fit", position, size)).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 2.5)
            optimizer.step()
            position += size
    for name, value in loss.net.state_dict().items():
        apart, moved = (whole[1].raw[f"net.{name}"] - value).norm(), (value - start[name]).norm()
        assert apart < (0.005 if value.numel() >= 4096 else 0.0005) * moved, name


def test_it_ends_near_adamw_of_32_bits(whole, tmp_path):
    full = run(tmp_path, optimizer="adamw").raw["net.2.weight"]
    start = Wide().net[2].weight.detach()
    apart, moved = (whole[1].raw["net.2.weight"] - full).norm(), (full - start).norm()
    assert 0 < apart < 0.1 * moved


@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_run_has_the_same_bits(whole, tmp_path, step):
    with pytest.raises(Interrupted):
        run(tmp_path, StopAt(step))
    again = run(tmp_path)
    for name, value in whole[1].raw.items():
        assert torch.equal(again.raw[name], value) and torch.equal(again.ema[name], whole[1].ema[name])
    final, expected = (load_checkpoint(folder / "2rf" / "checkpoints" / "fit") for folder in (tmp_path, whole[0]))
    assert final.optimizer.keys() == expected.optimizer.keys()
    assert all(torch.equal(value, expected.optimizer[name]) for name, value in final.optimizer.items())
    assert figures(folder_of(tmp_path)) == figures(folder_of(whole[0]))


def test_its_moments_take_a_quarter_of_the_memory():
    settings = job_of(Wide(), optimizer="adamw-8bit").settings
    engine = Engine(Wide(), settings, (4, 4))
    sizes = {
        name: value.numel() * value.element_size()
        for name, value in engine.optimizer_state()
        if name.startswith("net.2.weight/exp_avg_sq") and "qmap" not in name
    }
    assert sum(sizes.values()) == 64 * 64 + 4 * 64 * 64 // 256  # codes, and a scale for each 256 of them
    engine.close()
