"""Progressive distillation as a stage: halving after halving, stopped, resumed, shared out, exported and sampled."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from instaflow.config import load_experiment
from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError, Interrupted
from instaflow.models.settings import read_settings
from instaflow.sections import HalvingPhase
from instaflow.training import engine
from pipelines import progressive
from pipelines.experiment import run_all, run_one
from pipelines.on_couplings import Material, open_parts
from pipelines.plan import Plan
from pipelines.rehearse import rehearsal_of
from tests.experiments import folders
from tests.models.made import load, noise, write_flow, write_model
from tests.pipelines import alone
from tests.training.made import StopAt

STEPS = 3  # of each phase, 4 samples each
PROMPTS = ["a seven", "an odd digit"]
TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: TEACHER, prompts: [a seven, an odd digit, the digit 4], count: 16, records_per_shard: 8,
     batch_size: 8, num_steps: 2, guidance_scale: 2}
  halved: &halved
    {kind: distill, method: progressive, init: TEACHER, couplings: pairs, guidance_scale: 3, ema_decay: 0.6,
     trackers: [],
     phases: [{num_steps: 2, samples: 12, global_batch_size: 4, learning_rate: 1e-3},
              {num_steps: 1, samples: 12, global_batch_size: 4, learning_rate: 1e-3}]}
  four:
    {kind: distill, method: progressive, init: TEACHER, couplings: pairs, guidance_scale: 1, trackers: [],
     phases: [{num_steps: 4, samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
  flow:
    {kind: distill, method: progressive, init: FLOW, couplings: pairs, guidance_scale: 1.5, trackers: [],
     phases: [{num_steps: 2, samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("progressive")
    places = {"TEACHER": write_model(folder / "teacher"), "FLOW": write_flow(folder / "flow", "velocity")}
    text = TEXT
    for name, place in places.items():
        text = text.replace(name, str(place))
    (folder / "small.yaml").write_text(text)
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """All of it, never stopped."""
    run = tmp_path_factory.mktemp("whole")
    run_all(load_experiment(config, run=str(run)), StopAt())
    return run


def train(config, run: Path, whole: Path, *changes: str, stop_at: int | None = None) -> StopAt:
    return alone.train(config, "halved", run, whole, *changes, stop_at=stop_at)


def lines(run: Path) -> list[dict]:
    return alone.lines(run, "halved")


def near(one: Path, other: Path) -> None:
    for name in ("model", "model-raw"):
        own, expected = alone.weights(one, "halved", name), alone.weights(other, "halved", name)
        for key, value in own.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=2e-5)
    for line, expected in zip(lines(one), lines(other), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, STEPS, STEPS + 1])
def test_a_stopped_run_ends_in_the_same_bits_and_repeats_no_step(config, whole, tmp_path, done):
    """In the first halving, at the border between both, and in the second."""
    with pytest.raises(Interrupted, match="halved 1-step" if done >= STEPS else "halved 2-steps"):
        train(config, tmp_path, whole, stop_at=1 + done)  # a stage asks once before its work
    again = train(config, tmp_path, whole)
    assert again.asked == 2 * STEPS - done
    for name in ("model", "model-raw"):
        own, expected = alone.weights(tmp_path, "halved", name), alone.weights(whole, "halved", name)
        assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)
    assert lines(tmp_path) == lines(whole)
    assert [line["job"] for line in lines(whole)] == ["2-steps"] * STEPS + ["1-step"] * STEPS


def test_the_average_is_the_next_teacher_and_the_next_student(config, whole, tmp_path, monkeypatch):
    first = load_file(whole / "halved" / "checkpoints" / "2-steps" / f"{4 * STEPS:012d}" / "ema.safetensors")
    starts = []
    original = progressive.train

    def spied(job, stage, stop):
        teacher = job.loss.teacher.__closure__
        (model,) = [cell.cell_contents for cell in teacher if hasattr(cell.cell_contents, "unet")]
        student = {key: value.clone() for key, value in job.loss.unet.state_dict().items()}
        starts.append((student, {key: value.clone() for key, value in model.unet.state_dict().items()}))
        assert not model.unet.training and not any(weight.requires_grad for weight in model.unet.parameters())
        return original(job, stage, stop)

    monkeypatch.setattr(progressive, "train", spied)
    train(config, tmp_path, whole)
    teacher = load(Path(config).parent / "teacher").unet.state_dict()
    for start, expected in zip(starts, (teacher, {k.removeprefix("unet."): v for k, v in first.items()}), strict=True):
        for part in start:
            assert all(torch.equal(value, expected[key]) for key, value in part.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_train_alike(config, whole, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(engine, "PERSISTENT", 0)  # else stage 3 would shard none of these
    train(config, tmp_path, whole, f"zero_stage={stage}", "micro_batch_size=2", "gradient_checkpointing=true")
    near(tmp_path, whole)


def test_bfloat16_trains_nearly_alike(config, whole, tmp_path):
    train(config, tmp_path, whole, "mixed_precision=bfloat16")
    found = [one["loss"] / other["loss"] for one, other in zip(lines(tmp_path), lines(whole), strict=True)]
    assert all(0.8 < ratio < 1.25 and ratio != 1 for ratio in found)
    assert {value.dtype for value in alone.weights(tmp_path, "halved").values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_networks_train_alike(config, whole, tmp_path, monkeypatch):
    """But for the C++ code, which would take a minute to make: PyTorch runs the graphs that it finds."""
    compiler, compiled = torch.compile, []

    def compile_module(module, **options):
        compiled.append(module)
        module._compiled_call_impl = compiler(module._call_impl, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    train(config, tmp_path, whole, "compile=true")
    assert len(compiled) == 2  # the student and its teacher
    near(tmp_path, whole)


def test_a_sample_s_noise_is_its_own_and_not_the_coupled_one(config, whole):
    stage = folders(config, run=whole)["halved"]
    model, couplings = open_parts(stage)
    material = Material(model, couplings, model.view())
    phase = HalvingPhase(num_steps=1, samples=12, global_batch_size=4, learning_rate=1e-3)
    loss = progressive.HalvingLoss(model.unet, material.view, model.encode, progressive.guided(model, 1.0), 1)
    first, second = (progressive.halving(stage, material, loss, phase, start=start) for start in (0, 12))
    start, data, prompts = first.batch(0, 24)
    parts = [first.batch(place, 1) for place in range(24)]
    assert torch.equal(torch.cat([part[0] for part in parts]), start)
    assert torch.equal(torch.cat([part[1] for part in parts]), data)
    later = second.batch(0, 12)
    assert torch.equal(later[0], start[12:]) and torch.equal(later[1], data[12:]) and later[2] == prompts[12:]
    expected = coupled_noise(stage.seed, "halved", range(24), model.latent_shape)
    np.testing.assert_array_equal(start.numpy(), expected)
    coupled = couplings.batch(0, 24)
    np.testing.assert_array_equal(data.numpy(), coupled.latent)
    assert coupled.prompts == prompts
    assert not any(np.array_equal(one, other) for one in coupled.noise for other in start.numpy())
    assert len(np.unique(start[:, 0, 0, 0])) == 24  # the second epoch's are new, too
    assert second.describe(0, 4) == first.describe(12, 4)


def test_guidance_is_in_the_first_halving_alone(config, whole, tmp_path, monkeypatch):
    scales = []
    original = progressive.guided
    monkeypatch.setattr(
        progressive, "guided", lambda teacher, scale: (scales.append(scale), original(teacher, scale))[1]
    )
    train(config, tmp_path, whole)
    assert scales == [3.0, 1.0]


def test_guidance_is_of_the_velocities_and_costs_nothing_at_1(config):
    model = load(Path(config).parent / "teacher")
    view, x, timestep = model.view(), noise(2), torch.tensor([999, 499])

    def velocity(prompts, scale=1.0):
        return view.velocity(x, timestep, progressive.guided(model, scale)(prompts)(x, timestep))

    calls = []
    model.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    found = velocity(PROMPTS, 3.0)
    assert calls == [4]
    torch.testing.assert_close(found, 3 * velocity(PROMPTS) - 2 * velocity([None, None]), rtol=1e-3, atol=1e-3)
    assert calls == [4, 2, 2]


# --- what it begins with and leaves -----------------------------------------------------------------------------------


def test_it_is_measured_before_its_start(whole):
    parity, first = json.loads((whole / "halved" / "start_checks.json").read_text())
    assert "DDIM" in parity["what"] and parity["value"] < 1e-4
    assert first["what"] == "first loss, of 2 steps against 4 of its teacher"
    assert 0 < first["value"] < 10 * lines(whole)[0]["loss"]
    (alone,) = json.loads((whole / "flow" / "start_checks.json").read_text())
    assert alone["what"] == "first loss, of 2 steps against 4 of its teacher"


@pytest.mark.parametrize(
    ("stage", "num_steps", "parametrization"),
    [("halved", 1, "epsilon"), ("four", 4, "epsilon"), ("flow", 2, "velocity")],
)
@pytest.mark.parametrize("name", ["model", "model-raw"])
def test_stock_diffusers_samples_it_as_it_was_trained(whole, stage, name, num_steps, parametrization):
    folder = whole / stage / name
    settings = read_settings(folder)
    assert (settings.kind, settings.parametrization) == ("student", parametrization)
    assert (settings.num_steps, settings.guidance_scale) == (num_steps, 1.0)
    assert [entry["kind"] for entry in settings.lineage] == ["couple", "distill"]
    assert settings.lineage[-1]["samples_seen"] == (24 if stage == "halved" else 8)
    model = load(folder)
    ours = model.sample(noise(), PROMPTS)
    euler = model.trajectory(noise(), PROMPTS, num_steps=num_steps, guidance_scale=1.0).states[-1]
    torch.testing.assert_close(ours, euler, rtol=1e-4, atol=1e-4)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    latents = stock(
        PROMPTS, num_inference_steps=num_steps, guidance_scale=1.0, latents=noise(), output_type="latent"
    ).images
    torch.testing.assert_close(ours, latents, rtol=1e-5, atol=1e-5)
    assert f"A {'one' if num_steps == 1 else num_steps}-step text-to-image" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("counts", "words"),
    [([48, 24], "phases.0': the timesteps of 48 steps are not every other one of 96"), ([6], "strides of 1000 // 6")],
)
def test_a_grid_that_no_sampler_has_is_refused_before_training(config, whole, tmp_path, counts, words):
    phases = [f"{{num_steps: {n}, samples: 4, global_batch_size: 4, learning_rate: 1e-3}}" for n in counts]
    with pytest.raises(ConfigError) as caught:
        train(config, tmp_path, whole, f"phases=[{', '.join(phases)}]")
    assert words in caught.value.message and caught.value.hint
    assert not (tmp_path / "halved" / "checkpoints").exists()


@pytest.mark.parametrize(("stage", "warned"), [("halved", False), ("flow", True)])
def test_couplings_of_another_model_are_told(config, whole, tmp_path, capsys, stage, warned):
    """FLOW's folder says nothing of where it came from, and TEACHER made the couplings."""
    (tmp_path / "pairs").symlink_to(whole / "pairs")
    run_one(load_experiment(config, run=str(tmp_path)), stage, StopAt())
    words = f"{stage}: warning: the couplings 'pairs' were made by another model"
    assert (words in capsys.readouterr().out) is warned


# --- plan and rehearsal -----------------------------------------------------------------------------------------------


def test_the_plan_counts_two_calls_of_a_teacher_and_its_memory(config, whole):
    plan = Plan(load_experiment(config), gpus=1)
    flops, parameters = plan.architecture("halved").flops(), plan.architecture("halved").parameters()
    cost = plan.cost_of("halved")
    assert cost.flops == 12 * ((3 + 4) + (3 + 2)) * flops["unet"] + 24 * 2 * flops["text"]
    assert plan.cost_of("four").flops == 8 * ((3 + 2) * flops["unet"] + 2 * flops["text"])
    assert cost.memory.frozen == 4 * sum(parameters.values())  # the teacher's U-Net among them
    assert (cost.samples, cost.paper_days, plan.guidance("halved"), plan.is_flow("halved")) == (24, None, 1.0, True)
    held = sum(file.stat().st_size for file in (whole / "halved").rglob("*.safetensors"))
    assert cost.disk == pytest.approx(held, rel=0.1)  # a tiny model's headers are much of its files


def test_a_rehearsal_halves_as_often(config, tmp_path):
    experiment = load_experiment(config, ["stages.halved.phases.0.samples=400000"])
    stages = rehearsal_of(replace(experiment, run=str(tmp_path)), tmp_path).stages()
    assert [(phase.num_steps, phase.samples) for phase in stages["halved"].phases] == [(2, 400), (1, 8)]
    assert stages["halved"].guidance_scale == 3 and stages["halved"].init.startswith(str(tmp_path))
