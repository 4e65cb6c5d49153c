"""Distribution matching as a stage: stopped, resumed, shared out, exported, sampled, planned and rehearsed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from instaflow.config import load_experiment
from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError, DataError, InstaFlowError, Interrupted
from instaflow.models.architecture import drop_gradient, flops_of, num_parameters, peak_memory
from instaflow.models.sampling import generator_of
from instaflow.models.settings import ModelSettings, read_settings
from instaflow.rundir import stage_folders
from instaflow.training.checkpoint import complete_checkpoints
from instaflow.training.draws import draws
from instaflow.training.perceptual import PerceptualDistance, load_network, write_tiny_network
from pipelines import dmd
from pipelines.experiment import run_all, run_one
from pipelines.plan import Plan
from pipelines.plan import run as planned
from pipelines.rehearse import rehearsal_of
from pipelines.sample import run as sample
from pipelines.sample_request import Request, wanted_by
from tests.experiments import folders
from tests.models.made import load, noise, write_edm, write_flow, write_model
from tests.pipelines import alone
from tests.pipelines.dmd_worker import PHASES, ZERO
from tests.pipelines.runs import together
from tests.training.made import StopAt

PROMPTS = ["a seven", "an odd digit"]
PHASE = "{samples: 12, global_batch_size: 4, learning_rate: 1e-3}"
TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: TEACHER, prompts: [a seven, an odd digit, the digit 4], count: 16, records_per_shard: 8,
     batch_size: 8, num_steps: 2, guidance_scale: 2}
  whole:
    {kind: distill, method: dmd, init: TEACHER, teacher: TEACHER, prompts: [a seven, an odd digit, the digit 4],
     guidance_scale: 3, ema_decay: 0.6, trackers: [], preview: {every: 12, images: 4, grid: 2},
     fake: {updates: 2, learning_rate_scale: 2}, regression: {couplings: pairs, loss: l2, share: 0.5, matched: true},
     gan: {real: pairs}, phases: [PHASE, {samples: 4, global_batch_size: 4, learning_rate: 1e-3, gan_weight: 0}]}
  four:
    {kind: distill, method: dmd, init: TEACHER, teacher: TEACHER, prompts: [a seven], guidance_scale: 1, num_steps: 4,
     trackers: [], phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
  flow:
    {kind: distill, method: dmd, init: FLOW, teacher: FLOW, prompts: [a seven], guidance_scale: 1.5, trackers: [],
     phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
  digits:
    {kind: couple, model: EDM, prompts: ["3", "8"], count: 8, records_per_shard: 8, batch_size: 8, num_steps: 18,
     guidance_scale: 1, sampler: heun}
  pixels:
    {kind: distill, method: dmd, init: EDM, teacher: EDM, prompts: ["3", "8"], guidance_scale: 1, trackers: [],
     regression: {couplings: digits, loss: l2}, gan: {real: digits},
     phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
"""
STEPS = 4  # of `whole`


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dmd")
    places = {"TEACHER": write_model(folder / "teacher"), "FLOW": write_flow(folder / "flow", "velocity")}
    places["EDM"] = write_edm(folder / "edm")
    text = TEXT.replace("PHASE", PHASE)
    for name, place in places.items():
        text = text.replace(name, str(place))
    (folder / "small.yaml").write_text(text)
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> Path:
    """All of it, never stopped."""
    run = tmp_path_factory.mktemp("done")
    run_all(load_experiment(config, run=str(run)), StopAt())
    return run


def train(config, run: Path, done: Path, *changes: str, stop_at: int | None = None) -> StopAt:
    return alone.train(config, "whole", run, done, *changes, stop_at=stop_at)


def last_checkpoint(run: Path, stage: str = "whole") -> dict[str, dict[str, torch.Tensor]]:
    folder = complete_checkpoints(run / stage / "checkpoints")[-1]
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def same_checkpoint(one: Path, other: Path, stage: str = "whole") -> None:
    """Both networks, both averages, both optimizers, to the last bit."""
    own, expected = last_checkpoint(one, stage), last_checkpoint(other, stage)
    parts = {part + name for part in ("", "critic-") for name in ("model", "ema", "optimizer")}
    assert own.keys() == expected.keys() == parts
    for part, tensors in own.items():
        assert tensors.keys() == expected[part].keys()
        assert all(torch.equal(value, expected[part][key]) for key, value in tensors.items())


def lines(run: Path) -> list[dict]:
    return alone.lines(run, "whole")


def near(one: Path, other: Path) -> None:
    for name in ("model", "model-raw"):
        own, expected = alone.weights(one, "whole", name), alone.weights(other, "whole", name)
        for key, value in own.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=5e-5)
    for line, expected in zip(lines(one), lines(other), strict=True):
        for key in ("loss", "fake_loss") if "loss" in expected else ():
            assert line[key] == pytest.approx(expected[key], rel=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_run_ends_in_the_same_bits(config, done, tmp_path, steps):
    """And with every figure; stopped in a phase, and between two."""
    with pytest.raises(Interrupted, match=f"at {4 * steps} of 16 samples"):
        train(config, tmp_path, done, stop_at=1 + steps)  # a stage asks once before its work
    again = train(config, tmp_path, done)
    assert again.asked == STEPS - steps
    same_checkpoint(tmp_path, done)
    assert lines(tmp_path) == lines(done)


@pytest.mark.slow
def test_several_steps_in_bfloat16_end_in_the_same_bits(config, done, tmp_path):
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    half = ("mixed_precision=bfloat16", "gan={real: pairs}")
    alone.train(config, "four", tmp_path / "whole", done, *half)
    with pytest.raises(Interrupted, match="at 4 of 8 samples"):
        alone.train(config, "four", tmp_path / "again", done, *half, stop_at=2)
    alone.train(config, "four", tmp_path / "again", done, *half)
    same_checkpoint(tmp_path / "again", tmp_path / "whole", "four")
    told, exact = alone.lines(tmp_path / "whole", "four"), alone.lines(done, "four")
    assert alone.lines(tmp_path / "again", "four") == told
    for line, expected in zip(told, exact, strict=True):
        assert line["matching_loss"] != expected["matching_loss"]
        assert line["matching_loss"] == pytest.approx(expected["matching_loss"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("optimizer=adamw-8bit",), ("zero_stage=2", "offload_optimizer=true")])
def test_optimizers_of_other_kinds_go_on_in_the_same_bits(config, done, tmp_path, changes):
    """Both networks' and the discriminator's; stopped as the discriminator has learned, before it rests."""
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    train(config, tmp_path / "whole", done, *changes)
    with pytest.raises(Interrupted, match="at 8 of 16 samples"):
        train(config, tmp_path / "again", done, *changes, stop_at=3)
    assert train(config, tmp_path / "again", done, *changes).asked == 2
    same_checkpoint(tmp_path / "again", tmp_path / "whole")
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")


def test_the_figures_tell_each_term(done):
    told = [line for line in lines(done) if "loss" in line]
    names = {"matching_loss", "regression_loss", "gan_loss", "fake_loss", "discriminator_loss", "critic_gradient_norm"}
    assert names <= told[0].keys() and [line["samples_seen"] for line in told] == [4, 8, 12, 16]
    for line in told[:3]:
        whole = line["matching_loss"] + 0.25 * line["regression_loss"] + 1e-3 * line["gan_loss"]
        assert line["loss"] != pytest.approx(line["matching_loss"], rel=1e-3)
        assert whole == pytest.approx(line["loss"], rel=0.5)  # matched pairs are in the loss alone
    assert told[3]["gan_loss"] is None and told[3]["discriminator_loss"] is None  # as its phase says
    assert [line["samples_seen"] for line in lines(done) if "preview_distance" in line] == [12, 16]


def test_a_checkpoint_without_its_critic_is_told(config, done, tmp_path):
    with pytest.raises(Interrupted):
        train(config, tmp_path, done, stop_at=3)
    for file in (tmp_path / "whole" / "checkpoints" / f"{8:012d}").glob("critic-*"):
        file.unlink()
    with pytest.raises(DataError, match=r"it lacks critic-model.safetensors") as caught:
        train(config, tmp_path, done)
    assert "rm -r" in caught.value.hint


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_and_micro_batches_train_alike(config, done, tmp_path, stage):
    train(config, tmp_path, done, f"zero_stage={stage}", "micro_batch_size=2", "gradient_checkpointing=true")
    near(tmp_path, done)


@pytest.fixture(scope="module")
def two(config, done, tmp_path_factory) -> Path:
    """What two processes made under each ZeRO stage, and one alone: a discriminator rests, wakes and rests again."""
    run = tmp_path_factory.mktemp("two")
    for case in [f"{name}-{stage}" for name in ("whole", "resumed") for stage in ZERO]:
        alone.prepare(run / case, "whole", done)
    together(2, config, run, done, module="tests.pipelines.dmd_worker")
    alone.prepare(run / "alone", "whole", done)
    train(config, run / "alone", done, PHASES)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", ZERO)
def test_two_processes_train_as_one(two, stage):
    near(two / f"whole-{stage}", two / "alone")
    own, expected = (last_checkpoint(case)["critic-optimizer"] for case in (two / f"whole-{stage}", two / "alone"))
    assert own.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(own[key], value, rtol=2e-2, atol=1e-3 * value.abs().max().item())
        if key.endswith("/step"):
            assert own[key] == value == (4 if key.startswith("discriminator.") else 8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ZERO)
def test_two_processes_that_were_stopped_end_in_the_same_bits(two, stage):
    same_checkpoint(two / f"resumed-{stage}", two / f"whole-{stage}")
    assert lines(two / f"resumed-{stage}") == lines(two / f"whole-{stage}")


def test_bfloat16_trains_nearly_alike(config, done, tmp_path):
    train(config, tmp_path, done, "mixed_precision=bfloat16")
    pairs = zip(lines(tmp_path), lines(done), strict=True)
    found = [one["fake_loss"] / other["fake_loss"] for one, other in pairs if "fake_loss" in one]
    assert all(0.9 < ratio < 1.1 and ratio != 1 for ratio in found)


def test_samples_are_their_positions_own(config, done):
    """Whatever batches they come in: noise of the generator, of the critic, and the coupled ones at half the rate."""
    stage = folders(config, run=done)["whole"]
    parts = dmd.open_parts(stage)
    job = dmd.make_job(stage, parts, *dmd.make_losses(stage, parts), ModelSettings("student", num_steps=1))
    start, coupled, data, captions = job.batch(0, 16)
    pieces = [job.batch(place, 4) for place in range(0, 16, 4)]
    assert start.shape == (16, 2, 4, 8, 8) and torch.equal(torch.cat([piece[0] for piece in pieces]), start)
    assert torch.equal(torch.cat([piece[2] for piece in pieces]), data) and len(data) == 8 == len(captions)
    critic, real, _ = job.critic.batch(0, 16)
    values = torch.cat([start.flatten(), critic.flatten(), coupled.flatten()])
    assert len(values.unique()) > 0.97 * len(values)  # the coupled ones are of float16
    assert torch.equal(torch.cat([job.critic.batch(place, 8)[1] for place in (0, 8)]), real) and len(real) == 16


def test_a_phase_without_regression_reads_no_pairs(config, done):
    """Unless their distribution is to be matched, as in `whole`."""
    for matched in (False, True):
        changes = [
            f"stages.whole.regression.matched={str(matched).lower()}",
            "stages.whole.phases.1.regression_weight=0",
        ]
        stage = folders(config, *changes, run=done)["whole"]
        parts = dmd.open_parts(stage)
        job = dmd.make_job(stage, parts, *dmd.make_losses(stage, parts), ModelSettings("student", num_steps=1))
        for place, phase in enumerate(stage.stage.phases):
            job.begin(phase)
            taken = place == 0 or matched
            assert (job.batch(4 * place, 4)[1] is not None) is taken
            assert ("of 'pairs'" in job.describe(4 * place, 4)) is taken


def test_pairs_that_are_matched_alone_want_no_perceptual_network(config):
    change = "stages.whole.regression={couplings: pairs, weight: 0, matched: true}"
    stages = load_experiment(config, [change]).stages
    assert stages["whole"].perceptual is None and stages["whole"].regression.loss == "lpips"


def test_a_phase_whose_discriminator_rests_reads_no_real_images(config, done):
    stage = folders(config, run=done)["whole"]
    parts = dmd.open_parts(stage)
    job = dmd.make_job(stage, parts, *dmd.make_losses(stage, parts), ModelSettings("student", num_steps=1))
    for place, phase in [*enumerate(stage.stage.phases), (0, stage.stage.phases[0])]:
        job.begin(phase)
        assert (job.critic.batch(4 * place, 4)[1] is not None) is (place == 0)
        assert ("of 'pairs'" in job.critic.describe(4 * place, 4)) is (place == 0)


# --- what it begins with and leaves -----------------------------------------------------------------------------------


def test_it_is_measured_before_its_start(done):
    checks = json.loads((done / "whole" / "start_checks.json").read_text())
    assert [check["what"].split(",")[0] for check in checks] == [
        "largest difference to DDIM of the teacher",
        "first loss of the generator",
        "first loss of the fake score",
    ]
    assert checks[0]["value"] < 1e-4
    flow = json.loads((done / "flow" / "start_checks.json").read_text())
    assert len(flow) == 2  # a flow needs no map


@pytest.mark.parametrize(
    ("stage", "num_steps", "parametrization"),
    [("whole", 1, "epsilon"), ("four", 4, "epsilon"), ("flow", 1, "velocity")],
)
def test_stock_diffusers_samples_it_as_it_was_trained(done, stage, num_steps, parametrization):
    folder = done / stage / "model"
    settings = read_settings(folder)
    assert (settings.kind, settings.parametrization) == ("student", parametrization)
    assert (settings.num_steps, settings.guidance_scale) == (num_steps, 1.0)
    assert settings.lineage[-1]["samples_seen"] == (16 if stage == "whole" else 8)
    assert [entry["kind"] for entry in settings.lineage] == (["couple"] if stage == "whole" else []) + ["distill"]
    model = load(folder)
    ours = model.sample(noise(), PROMPTS)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    latents = stock(
        PROMPTS,
        num_inference_steps=num_steps,
        guidance_scale=1.0,
        latents=noise(),
        generator=[generator_of(one) for one in noise()],
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)
    assert isinstance(stock.scheduler, LCMScheduler) == (num_steps == 4)


def test_an_edm_of_pixels_is_matched_as_any_other(done, config):
    settings = read_settings(done / "pixels" / "model")
    assert (settings.kind, settings.parametrization, settings.num_steps) == ("student", "edm", 1)
    student, teacher = load(done / "pixels" / "model"), load(Path(config).parent / "edm")
    start = torch.randn(3, *student.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        timestep = student.view().grid(1)[0].expand(3)
        output = student.unet(start, timestep, **student.encode(["3", "8", "3"]), return_dict=False)[0]
    torch.testing.assert_close(
        student.sample(start, ["3", "8", "3"]), student.view().one_step(start, output), rtol=1e-4, atol=1e-4
    )
    before = teacher.unet.state_dict()
    moved = [key for key, value in student.unet.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) == len(before)
    told = [json.loads(line) for line in (done / "pixels" / "stats.jsonl").read_text().splitlines()]
    assert all(line["matching_loss"] > 0 and line["discriminator_loss"] > 0 for line in told if "loss" in line)


@pytest.mark.slow
def test_an_edm_without_classes_is_coupled_distilled_and_matched(tmp_path):
    phase = "phases: [{samples: 8, global_batch_size: 4, learning_rate: 1e-3}], trackers: []"
    text = f"""
run: unused
stages:
  teacher: {{kind: teacher, method: edm, data: digits, classes: false, num_steps: 4, {phase}}}
  pairs: {{kind: couple, model: teacher, prompts: [""], count: 8, batch_size: 8, num_steps: 3, guidance_scale: 1}}
  direct: {{kind: distill, init: teacher, couplings: pairs, parametrization: epsilon, preview: null, {phase}}}
  dmd: {{kind: distill, method: dmd, init: direct, teacher: teacher, prompts: [""], guidance_scale: 1,
        regression: {{couplings: pairs, loss: l2}}, gan: {{real: pairs}}, {phase}}}
"""
    (tmp_path / "edm.yaml").write_text(text)
    run_all(load_experiment(str(tmp_path / "edm.yaml"), run=str(tmp_path / "run")), StopAt())
    models = {name: load(tmp_path / "run" / name / "model") for name in ("teacher", "direct", "dmd")}
    assert {model.unet.config.num_class_embeds for model in models.values()} == {None}
    start = torch.randn(2, *models["dmd"].latent_shape, generator=torch.Generator().manual_seed(1))
    images = {name: model.sample(start, ["", ""], num_steps=1) for name, model in models.items()}
    assert all(found.isfinite().all() for found in images.values())
    assert not torch.equal(images["dmd"], images["direct"]) and not torch.equal(images["direct"], images["teacher"])
    assert read_settings(tmp_path / "run" / "dmd" / "model").parametrization == "edm"
    with pytest.raises(DataError, match="draws without any prompt, and '3' is one"):
        models["dmd"].sample(start, ["3", "3"])


def test_noise_between_steps_is_each_image_s_own(done, tmp_path):
    """It follows from the seed and the image's place: not from the batch, nor from who else is in it."""
    folder, prompts = str(done / "four" / "model"), ["a seven", "an odd digit", "a seven"]

    def latents(prompts: list[str], **options: int) -> np.ndarray:
        files = {"latents_file": tmp_path / "latents.npy", "output": f"{tmp_path}/grid.png"}
        request = Request(models=(folder,), prompts=tuple(prompts), seed=0, **files, **options)
        sample(request, wanted_by(request))
        return np.load(tmp_path / "latents.npy")

    whole = latents(prompts)
    np.testing.assert_allclose(latents(prompts[:1]), whole[:1], atol=1e-4)
    np.testing.assert_allclose(latents(prompts, batch_size=2), whole, atol=1e-4)
    model, first = load(done / "four" / "model"), noise(3)
    turned = model.sample(first.flip(0), prompts[::-1]).flip(0)
    torch.testing.assert_close(turned, model.sample(first, prompts), rtol=0, atol=1e-4)
    between = {
        seed: torch.randn(4, generator=generator_of(torch.from_numpy(start))) for seed, start in starts().items()
    }
    assert len({float(value) for drawn in between.values() for value in drawn}) == 12
    nearly = model.sample(first + 1e-5, prompts) - model.sample(first, prompts)
    assert nearly.abs().mean() > 0.1  # other bits, other noise on the way


def starts() -> dict[int, np.ndarray]:
    """The first noise of an image by `instaflow sample`, by its seed."""
    return {seed: coupled_noise(seed, "sample", range(1), (4, 8, 8))[0] for seed in (0, 1, 2)}


def test_noise_between_steps_couples_nothing(config, done, tmp_path):
    """A student of several steps draws noise on the way: its images are no smooth function of the first noise."""
    text = Path(config).read_text().replace("TEACHER", "x").split("  whole:")[0]
    text = text.replace(f"model: {Path(config).parent / 'teacher'}", f"model: {done / 'four' / 'model'}")
    (tmp_path / "pairs.yaml").write_text(text.replace("num_steps: 2", "num_steps: 4"))
    with pytest.raises(ConfigError, match="draws noise between its steps"):
        run_one(load_experiment(str(tmp_path / "pairs.yaml"), run=str(tmp_path / "run")), "pairs", StopAt())


def test_noise_between_steps_leaves_no_path_to_be_measured(config, done, tmp_path):
    """Of such a student there is no S(Z), and none is planned; it is the same in a folder."""
    report = """
  report:
    {kind: evaluate, protocol: digits, models: [{model: TEACHER, num_steps: [3]}, {model: four, num_steps: [4]}],
     reference: {model: TEACHER, num_steps: 3}, num_samples: 8, straightness_samples: 4, straightness_steps: 5}
"""
    teacher = load_experiment(config).stages["whole"].teacher
    (tmp_path / "few.yaml").write_text(Path(config).read_text() + report.replace("TEACHER", teacher))
    run = tmp_path / "run"
    run.mkdir()
    (run / "four").symlink_to(done / "four")
    experiment = load_experiment(str(tmp_path / "few.yaml"), run=str(run))
    run_one(experiment, "report", StopAt())
    found = json.loads((run / "report" / "report.json").read_text())
    bends = {row["model"]: row["straightness_relative"] for row in found["rows"]}
    assert bends[teacher] > 0 and bends["four"] is None
    assert [one["model"] for one in found["straightness_profiles"]] == [teacher]
    assert len(list((run / "report" / "observed").glob("*-paths"))) == 1

    in_folder = load_experiment(str(tmp_path / "few.yaml"), [f"stages.report.models.1.model={done / 'four' / 'model'}"])
    flops = Plan(experiment, gpus=1).architecture("four").flops()
    calls = 2 * (8 * 3 + 4 * 5) + 8 * 4  # the teacher's are guided
    for one in (experiment, in_folder):
        cost = Plan(one, gpus=1).cost_of("report")
        assert cost.flops == calls * flops["unet"] + 16 * (flops["text"] + flops["decode"])


@pytest.mark.parametrize(
    ("parts", "warned"),
    [
        ("init: TEACHER, teacher: TEACHER, regression: {couplings: pairs", False),
        ("init: whole, teacher: TEACHER, regression: {couplings: pairs", False),
        ("init: reflowed, teacher: reflowed, regression: {couplings: pairs", False),  # which began with TEACHER
        ("init: TEACHER, teacher: TEACHER, regression: {couplings: others", True),
        ("init: FLOW, teacher: FLOW, regression: {couplings: pairs", True),
    ],
)
def test_a_regression_on_another_model_s_couplings_is_told(config, done, tmp_path, capsys, parts, warned):
    teacher = Path(config).parent / "teacher"
    other = write_model(tmp_path / "other", seed=1)
    phases = "phases: [{samples: 4, global_batch_size: 4, learning_rate: 1e-3}]"
    couple = "prompts: [a seven], count: 8, num_steps: 2, guidance_scale: 1"
    stages = [
        f"others: {{kind: couple, model: {other}, {couple}}}",
        f"reflowed: {{kind: reflow, init: {teacher}, couplings: pairs, preview: null, {phases}}}",
        f"tried: {{kind: distill, method: dmd, prompts: [a seven], guidance_scale: 1, {phases}, {parts}, loss: l2}}}}",
    ]
    text = Path(config).read_text() + "".join(f"  {stage}\n" for stage in stages)
    text = text.replace("TEACHER", str(teacher)).replace("FLOW", str(teacher.parent / "flow"))
    (tmp_path / "tried.yaml").write_text(text)
    for name in ("pairs", "whole"):
        shutil.copytree(done / name, tmp_path / "run" / name)
    experiment = load_experiment(str(tmp_path / "tried.yaml"), run=str(tmp_path / "run"))
    for name in ("others", "reflowed"):
        if name in parts:
            run_one(experiment, name, StopAt())
    capsys.readouterr()
    run_one(experiment, "tried", StopAt())
    assert ("were made by another model" in capsys.readouterr().out) is warned


def test_each_setting_reaches_what_it_is_for(config, tmp_path):
    """Of a generator and a teacher that are two models, by couplings and real images that are of two stages."""
    for seed in (0, 1):
        run_one(load_experiment(config, [f"seed={seed}"], str(tmp_path / str(seed))), "pairs", StopAt())
    changes = {
        "init": write_model(tmp_path / "init", seed=1),
        "regression": "{couplings: pairs, weight: 0.3, loss: l2, share: 0.5}",
        "gan": f"{{real: {tmp_path / '1' / 'pairs'}, weight: 0.6, fake_weight: 0.7}}",
        "noise_range": "[0.1, 0.5]",
        "fake": "{updates: 5, learning_rate_scale: 4}",
        "phases": f"[{PHASE}]",
    }
    options = [f"stages.whole.{key}={value}" for key, value in changes.items()]
    stage = stage_folders(load_experiment(config, options, str(tmp_path / "0")))["whole"]
    parts = dmd.open_parts(stage)
    matching, fake_score = dmd.make_losses(stage, parts)
    job = dmd.make_job(stage, parts, matching, fake_score, parts.generator.settings)

    own, learned, known = (part.unet.state_dict() for part in (parts.generator, parts.fake, parts.teacher))
    assert all(torch.equal(value, known[key]) for key, value in learned.items())
    assert not torch.equal(own["conv_in.weight"], known["conv_in.weight"])
    x, timestep = noise(), torch.full((2,), 300.0)
    for score, scale in ((matching.real, 3.0), (matching.fake, 1.0)):
        text = parts.teacher.conditioning(PROMPTS, scale)
        with torch.no_grad():
            asked, expected = score(PROMPTS)(x, timestep), parts.teacher.guided(x, timestep, text, scale)
        torch.testing.assert_close(asked, expected)
    assert matching.prompts == ["a seven", "an odd digit", "the digit 4"]
    assert (matching.noise_range, matching.own_weights, fake_score.weight) == ((0.1, 0.5), (0.3, 0.6), 0.7)
    assert job.critic and (job.critic.updates, job.critic.learning_rate_scale) == (5, 4.0)
    assert parts.pairs and parts.real
    coupled, photographed = parts.pairs.batch(0, 2), parts.real.batch(0, 4)
    assert np.array_equal(job.batch(0, 4)[2].numpy(), coupled.latent)
    assert np.array_equal(job.critic.batch(0, 4)[1].numpy(), photographed.latent)
    assert not np.array_equal(coupled.latent, photographed.latent[:2])


def test_a_small_share_is_measured_before_the_start_as_well(config, done):
    phase = "[{samples: 64, global_batch_size: 64, learning_rate: 1e-3}]"
    options = ["regression.share=0.03125", "micro_batch_size=32", f"phases={phase}"]
    stage = folders(config, *[f"stages.whole.{change}" for change in options], run=done)["whole"]
    parts = dmd.open_parts(stage)
    matching, fake_score = dmd.make_losses(stage, parts)
    checks = dmd.first_checks(stage, parts, dmd.make_job(stage, parts, matching, fake_score, parts.generator.settings))
    assert len(checks) == 3 and matching.means.total()[1].tolist() == [1, 1, 1]  # pairs as well


@pytest.mark.parametrize("share", ["0.3333333", "0.6666667"])
def test_a_share_gives_as_many_pairs_at_every_position(config, done, tmp_path, share):
    """Millions of samples on, too, where a share that is rounded would be a whole sample off."""
    phase = "phases=[{samples: 12, global_batch_size: 3, learning_rate: 1e-3}]"
    options = [f"stages.whole.{change}" for change in (f"regression.share={share}", "gan=null", phase)]
    (tmp_path / "pairs").symlink_to(done / "pairs")
    stage = stage_folders(load_experiment(config, options, str(tmp_path)))["whole"]
    parts = dmd.open_parts(stage)
    job = dmd.make_job(stage, parts, *dmd.make_losses(stage, parts), parts.generator.settings)
    counts = {len(job.batch(position, 3)[2]) for position in (0, 3, 15_000_000, 15_000_003)}
    assert counts == {round(3 * float(share))}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["zero_stage=3"], "goes with 0, 1 or 2"),
        (["num_steps=2"], "regression goes with num_steps: 1"),
        (["num_steps=3", "regression=null", "preview=null"], "3 does not divide"),
        (["noise_range=[0.5, 0.5]"], "0.5 is not below 0.5"),
        (["regression.loss=lpips"], "needs a section 'perceptual'"),
        (["regression={couplings: pairs, weight: 0, matched: true}", "perceptual={network: x}"], "weight above 0"),
        (["regression=null"], "preview goes with a regression"),
        (["gan=null"], "gan_weight goes with a section 'gan'"),
        (["regression.share=0.3"], "is no whole number"),
        (["regression.share=1e-9"], "1e-09 of 4 samples, which a process takes at a time, is no whole number"),
        (["regression.share=0.0625", "micro_batch_size=2"], "0.0625 of 2 samples, which a process takes"),
        (["phases.0.global_batch_size=6", "micro_batch_size=3"], "0.5 of 3 samples, which a process takes"),
        (["regression.weight=0", "regression.matched=false"], "its weight is 0 in every phase"),
        (["compile=true"], "compile goes without gan"),
        (["compile=true", "gan=null", "num_steps=2", "regression=null"], "compile goes with num_steps: 1"),
        (["gan.weight=0"], "its weight is 0 in every phase"),
        (["phases.0.gan_weight=0"], "leave gan out"),
        (["fake.update=3"], "has no setting 'update'|'fake' has no 'update'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(config, done, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        train(config, tmp_path, done, *changes)
    assert not (tmp_path / "whole" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "words", "way_out"),
    [
        ("flow", ["num_steps=4"], "is a velocity flow, and diffusers has no sampler that adds noise", "num_steps: 1"),
        ("pixels", ["num_steps=4", "regression=null"], "is an EDM, and diffusers has no sampler", "num_steps: 1"),
        ("pixels", ["guidance_scale=2"], "is an EDM, of which guidance_scale knows nothing", "guidance_scale: 1"),
    ],
)
def test_what_a_teacher_of_another_kind_cannot_do_is_refused(config, done, tmp_path, stage, changes, words, way_out):
    (tmp_path / "digits").symlink_to(done / "digits")
    experiment = load_experiment(config, [f"stages.{stage}.{change}" for change in changes], str(tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        run_one(experiment, stage, StopAt())
    assert way_out in caught.value.hint


@pytest.mark.parametrize("other", ["init", "teacher"])
def test_each_prompt_is_a_class_of_both_networks(config, done, tmp_path, other):
    """All are looked at as the stage opens: training may draw the bad one late."""
    few = write_edm(tmp_path / "few", classes=5)
    for change, fault in (("prompts=['3', a seven]", "'a seven'"), (f"{other}={few}", "'8'")):
        stage = folders(config, f"stages.pixels.{change}", run=done)["pixels"]
        with pytest.raises(DataError, match=rf"{fault} is no class of .*"):
            dmd.open_parts(stage)


def test_a_run_goes_on_with_its_own_prompts_alone(config, done, tmp_path):
    """Of a file, too, whose name is no part of what is compared."""
    file = tmp_path / "prompts.txt"
    file.write_text("a seven\nan odd digit\n")
    with pytest.raises(Interrupted):
        train(config, tmp_path, done, f"prompts={file}", stop_at=2)
    file.write_text("a seven\nan even digit\n")
    with pytest.raises(InstaFlowError, match="prompts"):
        train(config, tmp_path, done, f"prompts={file}")


def test_prompts_are_read_before_any_stage_works(config, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    experiment = load_experiment(config, [f"stages.whole.prompts={tmp_path / 'empty.txt'}"], str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds no prompt"):
        run_all(experiment, StopAt())
    assert not (tmp_path / "run" / "pairs").exists()


# --- plan and rehearsal -----------------------------------------------------------------------------------------------


def test_the_plan_counts_both_networks(config, done):
    plan = Plan(load_experiment(config), gpus=1)
    flops, parameters = plan.architecture("whole").flops(), plan.architecture("whole").parameters()
    cost = plan.cost_of("whole")
    generator = 3 * 1.5 + 1.5 * 3  # with half as many pairs; three calls of the scores
    fake, judging = 1 + 3, (1 + 2) * 3  # the discriminator's passes, for both, in the phase that asks it
    assert (
        cost.flops == 16 * ((generator + 2 * fake) * flops["unet"] + 4 * flops["text"]) + 12 * judging * flops["unet"]
    )
    channels = plan.architecture("whole").unet["block_out_channels"][-1]
    discriminator = 9 * channels**2 + 3 * channels + channels + 1  # convolution, its bias and norm; a linear head
    assert cost.memory.weights == 4 * (2 * parameters["unet"] + discriminator)
    assert cost.memory.frozen == 4 * sum(parameters.values())
    assert (cost.samples, cost.paper_days, plan.guidance("whole"), plan.is_flow("whole")) == (16, None, 1.0, True)
    assert "are those of two networks" in "\n".join(planned(load_experiment(config), gpus=1, utilization=None))
    four = plan.cost_of("four")
    assert four.flops == 8 * ((3 + 1.5 + 2 + 1 + 1.5 + 3) * flops["unet"] + 3 * flops["text"])
    held = sum(file.stat().st_size for file in (done / "whole").rglob("*.safetensors"))
    assert cost.disk == pytest.approx(held, rel=0.15)  # a tiny model's headers are much of its files


@pytest.mark.parametrize("gan", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_s_activations_hold_what_both_steps_take(config, done, tmp_path, gan, checkpointing):
    """Both engines' passes counted tensor by tensor; the discriminator's pass adds to them."""
    changes = ["regression=null", "preview=null", f"gradient_checkpointing={str(checkpointing).lower()}"]
    changes += ["phases=[{samples: 64, global_batch_size: 16, learning_rate: 1e-3}]", *([] if gan else ["gan=null"])]
    experiment = load_experiment(config, [f"stages.whole.{change}" for change in changes], str(tmp_path / "run"))
    alone.prepare(tmp_path / "run", "whole", done)
    stage = stage_folders(experiment)["whole"]
    parts = dmd.open_parts(stage)
    matching, fake = dmd.make_losses(stage, parts)
    job = dmd.make_job(stage, parts, matching, fake, ModelSettings("student", num_steps=1))
    assert job.critic
    for network in (parts.generator.unet, parts.fake.unet, *([fake.discriminator] if gan else [])):
        network.requires_grad_(True).train()
        if checkpointing and network is not fake.discriminator:
            network.enable_gradient_checkpointing()
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    noise, batch, judged = draws(0, "x", 0, 16), job.batch(0, 16), job.critic.batch(0, 16)
    taken = [peak_memory(lambda: matching(*batch, noise).backward())]
    taken += [peak_memory(lambda: fake(*judged, noise).backward())]
    planned = Plan(experiment, gpus=1).cost_of("whole").memory.activations
    assert max(taken) <= planned < 1.4 * max(taken)
    if gan and not checkpointing:
        assert planned < 1.05 * max(taken)


def test_the_plan_counts_what_a_regression_by_lpips_holds_and_decodes(config, tmp_path):
    """In the phases where it counts: a tiny decoder, and the network that looks at what it makes."""
    sizes = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "tiny")
    write_tiny_network(tmp_path / "eye")
    perceptual = f"{{network: {tmp_path / 'eye'}, decoder: {tmp_path / 'tiny'}}}"
    lpips = ["regression.loss=lpips", "regression.matched=false", f"perceptual={perceptual}"]

    def cost(*changes: str):
        return Plan(load_experiment(config, [f"stages.whole.{change}" for change in changes]), gpus=1).cost_of("whole")

    plain, seen = cost("regression.matched=false"), cost(*lpips)
    network = load_network(tmp_path / "eye")
    look = PerceptualDistance(tiny.requires_grad_(False), network)
    pair = 3 * flops_of(lambda: network(look.decode(noise(1))))  # a coupled latent, and a made one there and back
    assert seen.flops - plain.flops == 0.5 * 16 * pair > 0
    held = num_parameters(tiny) + num_parameters(network)
    assert seen.memory.frozen - plain.memory.frozen == 4 * held
    alive = peak_memory(lambda: look(noise(2).requires_grad_(), noise(2), np.empty(0)).mean().backward())
    assert seen.memory.activations - plain.memory.activations == pytest.approx(alive, rel=0.05)

    unet = Plan(load_experiment(config), gpus=1).architecture("whole").flops()["unet"]
    less = cost(*lpips, "phases.1.regression_weight=0")
    assert seen.flops - less.flops == 0.5 * 4 * (pair + 3 * unet)  # neither decoded nor made
    late = cost(*lpips, "phases.0.regression_weight=0")
    assert seen.flops - late.flops == 0.5 * 12 * (pair + 3 * unet)


def test_a_rehearsal_has_all_of_its_terms(config, tmp_path):
    experiment = load_experiment(config, ["stages.whole.phases.0.samples=400000"])
    stages = rehearsal_of(replace(experiment, run=str(tmp_path)), tmp_path).stages()
    assert [phase.samples for phase in stages["whole"].phases] == [4, 4]
    assert stages["whole"].teacher.startswith(str(tmp_path)) and stages["whole"].regression.couplings == "pairs"
    assert stages["four"].num_steps == 4


def test_a_student_is_no_teacher(config, done, tmp_path):
    (tmp_path / "pairs").symlink_to(done / "pairs")
    options = [f"stages.whole.teacher={done / 'whole' / 'model'}"]
    with pytest.raises(ConfigError, match="is a student, which knows the data behind noise at its own timesteps alone"):
        run_one(load_experiment(config, options, str(tmp_path)), "whole", StopAt())


def test_a_teacher_s_latents_are_the_generator_s(config, done, tmp_path):
    other = write_edm(tmp_path / "larger", size=16)
    stage = folders(config, f"stages.pixels.teacher={other}", run=done)["pixels"]
    words = r"larger' makes latents of shape \(3, 16, 16\), '.*edm' \(3, 8, 8\)"
    with pytest.raises(ConfigError, match=words) as caught:
        dmd.open_parts(stage)
    assert caught.value.hint == "Let init be the teacher, or a student of it"


def test_a_discriminator_wants_a_bottleneck(config, done, tmp_path):
    shutil.copytree(load_experiment(config).stages["whole"].teacher, tmp_path / "pruned")
    unet = tmp_path / "pruned" / "unet"
    form, weights = json.loads((unet / "config.json").read_text()), unet / "diffusion_pytorch_model.safetensors"
    (unet / "config.json").write_text(json.dumps(form | {"mid_block_type": None}))
    save_file({key: value for key, value in load_file(weights).items() if "mid_block" not in key}, weights)
    (tmp_path / "pairs").symlink_to(done / "pairs")
    options = [f"stages.whole.{key}={tmp_path / 'pruned'}" for key in ("init", "teacher")]
    with pytest.raises(ConfigError, match=r"reads a U-Net's bottleneck, and '.*' is a U-Net without one"):
        run_one(load_experiment(config, options, str(tmp_path)), "whole", StopAt())
