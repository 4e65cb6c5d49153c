"""The setting `compile`, in a training on couplings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from instaflow.couplings.loader import Batch
from instaflow.errors import InstaFlowError
from instaflow.methods import DistillStage
from instaflow.sections import FlowPhase
from instaflow.training.losses import DistillLoss
from pipelines import on_couplings
from tests.models.made import load, noise, write_flow
from tests.training.made import StopAt, folder_of

PHASES = [FlowPhase(samples=8, global_batch_size=4, learning_rate=1e-3)]


class Pairs:
    """Couplings of noise alone."""

    def batch(self, position, size):
        latents = (noise(size, seed=position), noise(size, seed=position + 1))
        return Batch(*(part.numpy() for part in latents), ["the digit 7"] * size, np.arange(size))


def distilled(folder, **settings):
    model = load(write_flow(folder / "model", "velocity"))
    model.unet.requires_grad_(True)
    stage = folder_of(folder)
    stage.stage = DistillStage(kind="distill", init="2rf", couplings="pairs", phases=PHASES, preview=None, **settings)
    loss = DistillLoss(model.unet, model.view(), model.encode)
    material = on_couplings.Material(model, Pairs(), model.view())
    return on_couplings.train_on(stage, StopAt(), material, loss, model.settings), model


@pytest.mark.slow
def test_a_compiled_network_trains_as_it_does_uncompiled(tmp_path, monkeypatch):
    """But for the C++ code, which would take a minute to make: PyTorch runs the graphs that it finds."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: setattr(
            module, "_compiled_call_impl", compiler(module._call_impl, backend="aot_eager", **options)
        ),
    )
    plain, _ = distilled(tmp_path / "plain")
    compiled, model = distilled(tmp_path / "compiled", compile=True)
    assert model.unet._compiled_call_impl is not None
    assert compiled.raw.keys() == plain.raw.keys()
    for name, value in compiled.raw.items():
        torch.testing.assert_close(value, plain.raw[name], rtol=1e-2, atol=1e-5)


def test_networks_of_one_class_are_compiled_for_each_of_their_batches(tmp_path, monkeypatch):
    """As a generator, its teacher and its fake score are, which do not train with the batch that the checks look at."""
    compiler, graphs = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: setattr(
            module, "_compiled_call_impl", compiler(module._call_impl, backend=keep, **options)
        ),
    )
    models = [SimpleNamespace(name="a model", device=torch.device("cpu"), unet=Doubled()) for _ in range(3)]
    with torch._dynamo.config.patch(recompile_limit=8):
        on_couplings.compile_networks(folder_of(tmp_path), *models)
        for batch in range(2, 14):
            assert torch.equal(models[batch % 3].unet(torch.ones(batch)), 2 * torch.ones(batch))
    assert len(graphs) == 12


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_without_a_compiler_it_says_so_before_training(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    with pytest.raises(InstaFlowError, match="cannot be compiled here: No working") as caught:
        distilled(tmp_path, compile=True)
    assert "compile: false" in caught.value.hint and not (tmp_path / "2rf" / "checkpoints").exists()


def test_stage_3_and_compiling_do_not_go_together():
    with pytest.raises(ValidationError, match="compile goes with zero_stage 0, 1 or 2"):
        DistillStage(kind="distill", init="2rf", couplings="pairs", phases=PHASES, compile=True, zero_stage=3)
