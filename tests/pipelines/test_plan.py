"""What a plan says, against numbers worked out by hand; its disk is compared with files in test_rehearse.py."""

import re

import pytest
import torch

from instaflow.config import load_experiment
from instaflow.errors import ConfigError, DataError
from instaflow.models.families import SD1
from pipelines.plan import Plan, network_calls, run
from tests.experiments import PHASE, write
from tests.models.made import write_edm, write_flow, write_model

TEXT = f"""
run: runs/tiny
stages:
  pairs: {{kind: couple, model: PLACE, prompts: [a seven], count: 1000, num_steps: 10, guidance_scale: 5.0}}
  2rf: {{kind: reflow, init: PLACE, couplings: pairs, phases: [{PHASE}, {PHASE}]}}
  pairs2: {{kind: couple, model: 2rf, prompts: [a seven], count: 1000, num_steps: 10, guidance_scale: 1.0}}
  student: {{kind: distill, init: 2rf, couplings: pairs2, phases: [{PHASE}]}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An experiment with a tiny teacher."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return write(tmp_path, TEXT.replace("PLACE", str(write_model(tmp_path / "teacher"))))


def costs(config: str, *overrides: str, gpus: int = 1) -> dict:
    plan = Plan(load_experiment(config, overrides), gpus)
    return {name: plan.cost_of(name) for name in plan.stages}


def test_flops_follow_the_calls_of_the_network(config):
    usual, flops = costs(config), Plan(load_experiment(config), 1).architecture("2rf").flops()
    assert usual["pairs"].flops == 1000 * (2 * 10 * flops["unet"] + flops["text"])
    assert usual["pairs2"].flops == 1000 * (10 * flops["unet"] + flops["text"])
    assert usual["2rf"].flops == 2 * 8 * (3 * flops["unet"] + flops["text"])
    assert usual["student"].samples == 8
    changed = costs(config, "stages.2rf.gradient_checkpointing=true", "stages.pairs.keep={images: {every: 10}}")
    assert changed["2rf"].flops - usual["2rf"].flops == 2 * 8 * flops["unet"]
    assert changed["pairs"].flops - usual["pairs"].flops == 100 * flops["decode"]


@pytest.mark.parametrize(("sampler", "calls"), [("dpm-solver++", 10), ("heun", 19), ("pndm", 11)])
def test_samplers_call_the_network_as_often_as_they_do(tmp_path, config, sampler, calls):
    from instaflow.models.samplers import coupling_scheduler
    from tests.models.made import load

    scheduler = coupling_scheduler(load(tmp_path / "teacher"), sampler)
    scheduler.set_timesteps(10)
    stage = load_experiment(config, [f"stages.pairs.sampler={sampler}"]).stages["pairs"]
    assert network_calls(stage, is_flow=False) == len(scheduler.timesteps) == calls


def test_a_flow_in_a_folder_is_called_once_a_step(tmp_path, config):
    flow = write_flow(tmp_path / "flow", "velocity")
    found = costs(config, f"stages.pairs.model={flow}", "stages.pairs.guidance_scale=1")
    assert found["pairs"].flops == found["pairs2"].flops


def test_memory_is_that_of_the_zero_stage_and_the_precision(config):
    none = "stages.2rf.preview=null"  # it takes the same however small the batch is
    usual = costs(config, none)["2rf"].memory
    shared = costs(config, none, "stages.2rf.zero_stage=2", gpus=2)["2rf"].memory
    assert shared.gradients * 2 == usual.gradients
    assert shared.activations == pytest.approx(usual.activations / 2, rel=0.05)  # half of the batch
    half = costs(config, "stages.pairs.dtype=float16")["pairs"].memory
    assert half.frozen * 2 == costs(config)["pairs"].memory.frozen


def test_the_packaged_stable_diffusion_plan_matches_the_papers_sums(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = costs("sd15-instaflow", gpus=8)
    days = {name: cost.paper_days for name, cost in found.items()}
    assert days == pytest.approx({"pairs": 8, "2rf": 11.2 + 64, "pairs2": 8, "student": 54.4 + 53.6})
    assert found["pairs"].flops == pytest.approx(1.6e6 * 50 * SD1.flops()["unet"], rel=0.001 + 0.0003)
    assert all(cost.half for cost in found.values())
    assert found["2rf"].memory.total == pytest.approx(
        20 * 859.5e6 + 4 * 206.7e6 + found["2rf"].memory.activations, rel=0.01
    )


def test_a_perceptual_phase_costs_three_decodings_and_their_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    none = "stages.student.preview=null"
    whole = costs("sd15-instaflow", none)["student"]
    other = costs("sd15-instaflow", none, "stages.student.phases.1.loss=l2", "stages.student.perceptual=null")[
        "student"
    ]
    assert whole.flops - other.flops == pytest.approx(3 * 18_432_000 * SD1.flops()["decode"])
    assert whole.memory.activations - other.memory.activations == SD1.perceptual_memory(8, bfloat16=True)
    cropped = costs("sd15-instaflow", none, "stages.student.perceptual.crop=32")["student"]
    assert cropped.flops - other.flops == pytest.approx((whole.flops - other.flops) / 4)
    assert cropped.memory.activations < other.memory.activations + 0.3 * SD1.perceptual_memory(8, bfloat16=True)


def test_perceptual_parts_count_as_they_run(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    perceptual = [
        "stages.2rf.phases.1.loss=lpips",
        "stages.2rf.perceptual={network: alex, weights: alex.pth, crop: 16}",
    ]
    plain, reflow = (costs("sd15-instaflow", *changes)["2rf"] for changes in ([], perceptual))
    added = SD1.perceptual_memory(16, bfloat16=False, crop=16)  # float32, whatever the network computes in
    assert reflow.memory.activations - plain.memory.activations == added
    again = "stages.student.gradient_checkpointing=true"
    once, twice = (costs("sd15-instaflow", *changes)["student"] for changes in ([], [again]))
    unet, decode = SD1.flops()["unet"], SD1.flops()["decode"]
    assert twice.flops - once.flops == pytest.approx(40_448_000 * unet + 18_432_000 * decode)
    assert twice.memory.activations < 0.6 * once.memory.activations
    with pytest.raises(ConfigError, match=r"perceptual.crop is 65, a latent's side 64"):
        costs("sd15-instaflow", "stages.student.perceptual.crop=65")


def test_a_preview_needs_room_for_a_second_network_and_what_it_computes(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    small = ["stages.2rf.micro_batch_size=1", "stages.2rf.gradient_checkpointing=true"]
    with_preview, without = (
        costs("sd15-instaflow", *small, *more)["2rf"] for more in ([], ["stages.2rf.preview=null"])
    )
    sampling = max(SD1.sampling_memory(32, torch.float32), SD1.decoding_memory(8, torch.float32))
    assert with_preview.memory.activations == 4 * SD1.parameters()["unet"] + sampling > without.memory.activations


def test_two_unets_in_series_cost_about_twice_as_much(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    one, two = (costs("sd15-instaflow", f"stages.2rf.stacked={stacked}") for stacked in ("false", "true"))
    for name in ("2rf", "pairs2"):
        assert two[name].flops == pytest.approx(2 * one[name].flops, rel=0.05)
    assert two["2rf"].memory.weights == 4 * 1_719_017_924 and two["pairs"] == one["pairs"]
    assert two["2rf"].paper_days is two["student"].paper_days is None


def test_the_plan_fits_a_terminal_and_says_what_it_rests_on(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lines = run(load_experiment("sd15-instaflow"), gpus=1, utilization=None)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "an assumption: no GPU was measured yet" in text
    totals = [line.split() for line in lines if line.strip().startswith("total")]
    assert totals[0][1:3] == ["3,200,000", "70,528,000"]
    assert totals[1][-1] == "199.2"
    assert "InstaFlow, A100" in text and "fake score" not in text
    told = "\n".join(run(load_experiment("sd15-instaflow"), gpus=1, utilization=0.6))
    assert "assumption" not in told
    days = [float(re.search(r"total +([\d.]+)", part.partition("GPU-days")[2])[1]) for part in (text, told)]
    assert days[0] == pytest.approx(2 * days[1], rel=0.01)


def test_a_batch_that_cannot_be_shared_and_an_unknown_model_are_errors(config):
    with pytest.raises(ConfigError, match=r"stages.2rf.phases.0.*3 processes"):
        costs(config, gpus=3)
    with pytest.raises(DataError, match="'someone/something' is made of"):
        costs(config, "stages.pairs.model=someone/something")


def test_an_edm_is_counted_by_its_one_network(tmp_path):
    text = f"""
run: runs/edm
stages:
  teacher: {{kind: teacher, method: edm, data: digits, phases: [{PHASE}]}}
  pairs: {{kind: couple, model: teacher, prompts: ["7"], count: 100, num_steps: 18, guidance_scale: 1}}
  found: {{kind: couple, model: teacher, data: digits, count: 100, num_steps: 18, guidance_scale: 1}}
  student: {{kind: distill, init: teacher, couplings: pairs, parametrization: epsilon, phases: [{PHASE}]}}
  outside: {{kind: couple, model: {write_edm(tmp_path / "other", classes=None)}, prompts: [""], count: 100,
            sampler: dpm-solver++, num_steps: 18, guidance_scale: 1}}
"""
    config = write(tmp_path, text)
    found, plan = costs(config), Plan(load_experiment(config), 1)
    flops = plan.architecture("teacher").flops()
    assert flops["text"] == flops["encode"] == flops["decode"] == 0
    assert found["teacher"].flops == 8 * 3 * flops["unet"] == found["student"].flops
    assert found["pairs"].flops == found["found"].flops == 100 * 35 * flops["unet"]  # by Heun's method
    other = plan.architecture(str(tmp_path / "other"))
    assert found["outside"].flops == 100 * 18 * other.flops()["unet"]
    assert other.parameters() == {"unet": other.parameters()["unet"], "vae": 0, "text": 0}
    assert other.latent_shape == (3, 8, 8) and other.image_size == (8, 8)
    assert len(run(load_experiment(config), gpus=1, utilization=None)) > 10
