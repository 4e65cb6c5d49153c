"""One of several processes that train the same small networks under every ZeRO stage: all cases in one launch."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instaflow.errors import InstaFlowError, Interrupted
from instaflow.files import write_json
from instaflow.sections import Phase
from instaflow.training import engine, loop
from instaflow.world import barrier, leave, world
from tests.training.made import StopAt, batch, figures, folder_of, job_of

STAGES = (0, 1, 2, 3)
PHASES = [
    Phase(samples=24, global_batch_size=6, learning_rate=1e-2, warmup_samples=12),
    Phase(samples=24, global_batch_size=12, learning_rate=4e-3),
]
TOTAL = 48
STOPPED = 3  # steps


class Odd(nn.Module):
    """A loss over parameters that no number of processes divides, one of them frozen, and buffers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))
        self.scale = nn.Parameter(torch.tensor([0.7]), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.zeros(2))
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, y: Tensor, draws: np.ndarray) -> Tensor:
        out = self.net(x + torch.from_numpy(draws[:, :1]).float())
        self.seen += len(x)
        self.level += 1
        self.dtypes.add(out.dtype)
        return (self.scale * out - y).square().mean()


def zero_job(loss: nn.Module, **changes):
    return job_of(loss, **({"phases": PHASES, "gradient_clipping": 1.0} | changes))


def bad_batch(position: int, size: int) -> tuple[Tensor, Tensor]:
    """The last process's part of the third global batch is spoilt."""
    x, y = batch(position, size)
    return (x, y * math.nan) if position <= 17 < position + size else (x, y)


class Root(Odd):
    """Its gradient, not its value, is not a number for the last sample of the third global batch."""

    def forward(self, x: Tensor, y: Tensor, draws: np.ndarray) -> Tensor:
        spoilt = torch.equal(y[-1:], batch(17, 1)[1])
        edge = self.net(x[-1:]).sum() * 0 + (not spoilt)
        return super().forward(x, y, draws) + 0 * edge.abs().sqrt()


def finish(run: Path, case: str, loss: nn.Module, **changes) -> list[dict[str, Tensor]]:
    """Train to the end; the leader leaves the outcome in CASE.*, and every step's weights are returned."""
    steps: list[dict[str, Tensor]] = []
    save = loop.save_checkpoint

    def keep(folder, parts, state, **keywords):
        model = [(name, value.clone()) for name, value in parts["model"]]
        steps.append(dict(model))
        return save(folder, parts | {"model": model}, state, **keywords)

    loop.save_checkpoint = keep
    try:
        folder = folder_of(run / case)
        trained = loop.train(zero_job(loss, **changes), folder, StopAt())
    finally:
        loop.save_checkpoint = save
    if world().leads:
        save_file(trained.raw, run / case / "raw.safetensors")
        save_file(trained.ema, run / case / "ema.safetensors")
        save_file(
            {name: value.detach().contiguous() for name, value in loss.state_dict().items()},
            run / case / "module.safetensors",
        )
        write_json(run / case / "figures.json", figures(folder))
    return steps


def stop(run: Path, case: str, **changes) -> None:
    try:
        loop.train(zero_job(Odd(), **changes), folder_of(run / case), StopAt(STOPPED))
    except Interrupted:
        return
    raise AssertionError("it was not stopped")


def fail(run: Path, case: str, loss: nn.Module, **changes) -> None:
    try:
        loop.train(zero_job(loss, checkpoint_every=6, **changes), folder_of(run / case), StopAt())
    except InstaFlowError as error:
        write_json(run / case / f"error-{world().rank}.json", error.message)


def reference_average(start: nn.Module, steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average of weights after each step, in float64."""
    average = {name: value.double() for name, value in start.state_dict().items()}
    for n, weights in enumerate(steps):
        own = min(decay, (1 + n) / (10 + n))
        for name, value in weights.items():
            average[name] += (1 - own) * (value.double() - average[name])
    return average


def together(run: Path, model_folder: Path) -> None:
    """Every case that two processes begin."""
    for stage in STAGES:
        settings = {"zero_stage": stage}
        steps = finish(run, f"whole-{stage}", Odd(), checkpoint_every=1, **settings)
        if world().leads:
            save_file(reference_average(Odd(), steps, 0.7), run / f"whole-{stage}" / "reference.safetensors")
        finish(run, f"micro-{stage}", Odd(), micro_batch_size=1, **settings)
        stop(run, f"resumed-{stage}", **settings)
        finish(run, f"resumed-{stage}", Odd(), **settings)
        stop(run, f"stopped-{stage}", **settings)
        fail(run, f"loss-{stage}", Odd(), batch=bad_batch, **settings)
        fail(run, f"gradient-{stage}", Root(), **settings)

        if stage:
            offloaded = settings | {"offload_optimizer": True}
            finish(run, f"offloaded-{stage}", Odd(), **offloaded)
            stop(run, f"offloaded-resumed-{stage}", **offloaded)
            finish(run, f"offloaded-resumed-{stage}", Odd(), **offloaded)
            fail(run, f"offloaded-gradient-{stage}", Root(), **offloaded)

        half = settings | {"mixed_precision": "bfloat16"}
        loss = Odd()
        finish(run, f"half-{stage}", loss, **half)
        assert loss.dtypes == {torch.bfloat16}
        stop(run, f"half-resumed-{stage}", **half)
        finish(run, f"half-resumed-{stage}", Odd(), **half)
    for stage in (0, 3):
        unet(run, model_folder, stage)
        text_encoder(run, stage)


def unet(run: Path, model_folder: Path, stage: int) -> None:
    """Reflow of a small Stable Diffusion; under stage 3 with gradient checkpointing as well."""
    from instaflow.training.losses import ReflowLoss
    from tests.models.made import load, noise

    def couplings(position: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
        rows = torch.cat([noise(2, seed=position + row)[:, None] for row in range(size)], 1)  # [2, B, C, H, W]
        return rows[0], rows[1], ["the digit 7"] * size

    model = load(model_folder)
    model.unet.requires_grad_(True)
    loss = ReflowLoss(model.unet, model.view(), model.encode, 0.1)
    if stage == 3:
        model.unet.enable_gradient_checkpointing()
    phases = [Phase(samples=8, global_batch_size=4, learning_rate=1e-3)]
    finish(run, f"unet-{stage}", loss, batch=couplings, phases=phases, zero_stage=stage)
    assert model.sample(noise(1), ["a digit"], num_steps=1, guidance_scale=1.0).isfinite().all()


def text_encoder(run: Path, stage: int) -> None:
    """A teacher's text encoder in two trainings: the second takes over what the first one left."""
    from instaflow.digits.networks import build_text_encoder
    from instaflow.digits.stream import CaptionLoss
    from instaflow.digits.tokenizer import build_tokenizer

    def captions(position: int, size: int) -> tuple[list[str]]:
        return (["a seven", "an odd digit", "the digit 4", "zero"][:size],)

    torch.manual_seed(0)
    tokenizer = build_tokenizer("digits")
    network = build_text_encoder(tokenizer, "digits")
    phases = [Phase(samples=8, global_batch_size=4, learning_rate=1e-3)]
    for case in ("text", "text-again"):
        loss = CaptionLoss(network, tokenizer=tokenizer, allowed_by=lambda text: [frozenset({len(text) % 10})], cells=1)
        finish(run, f"{case}-{stage}", loss, batch=captions, phases=phases, zero_stage=stage)
        barrier()  # the leader wrote it
        loss.load_state_dict(load_file(run / f"{case}-{stage}" / "ema.safetensors"))


def resume(run: Path) -> None:
    """What other processes stopped, under another stage."""
    for stage in STAGES:
        finish(run, f"stopped-{stage}", Odd(), zero_stage=(stage + 1) % 4)


if __name__ == "__main__":
    engine.PERSISTENT = 0  # else stage 3 would shard none of these
    task, run, *rest = sys.argv[1:]
    if task == "together":
        together(Path(run), Path(rest[0]))
    else:
        resume(Path(run))
    leave()
