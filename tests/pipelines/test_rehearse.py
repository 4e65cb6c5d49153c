"""Every packaged experiment is rehearsed, and a rehearsal changes what it says and nothing else."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from instaflow.config import load_experiment
from instaflow.couplings.manifest import read_manifest
from instaflow.errors import ConfigError
from pipelines.plan import Plan
from pipelines.rehearse import CAPTIONS, rehearsal_of, settle
from tests.experiments import PHASE, write
from tests.models.made import write_flow
from tests.pipelines.runs import ROOT, instaflow, stop_when

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HUB = "stabilityai/stable-diffusion-2-1"
TEXT = f"""
run: run
stages:
  pairs: {{kind: couple, model: {HUB}, prompts: captions.txt, count: 16000, batch_size: 2, guidance_scale: 2.0,
    records_per_shard: 8, num_steps: 2, output: "s3://bucket/pairs"}}
  2rf: {{kind: reflow, init: {HUB}, couplings: pairs, phases: [{PHASE}], checkpoint_every: 4}}
  3rf: {{kind: reflow, init: FLOW, couplings: OTHER, phases: [{PHASE}]}}
"""


def least(config: Path) -> list[str]:
    """`--set` options that cut counts and batches to little: a thousandth, which a rehearsal takes, may be minutes."""
    options = []
    for name, stage in load_experiment(str(config)).stages.items():
        settings = stage.model_dump()
        for key in ("phases", "autoencoder_phases", "text_phases", "perceptual_phases"):
            for index, phase in enumerate(settings.get(key) or ()):
                micro = settings.get("micro_batch_size") or 1
                batch = min(phase["global_batch_size"], max(64 // micro, 1) * micro)
                options.append(f"stages.{name}.{key}.{index}.global_batch_size={batch}")
                options.append(f"stages.{name}.{key}.{index}.samples={2 * batch}")
        if settings["kind"] == "couple":
            options.append(f"stages.{name}.count={2 * settings['batch_size']}")
    return [word for option in options for word in ("--set", option)]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_packaged_experiment_can_be_rehearsed(config: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", least(config)
    done = instaflow("rehearse", config, "--run-dir", run, *options, cwd=tmp_path)
    experiment = load_experiment(str(config), options[1::2])
    assert f"The rehearsal went well: {len(experiment.stages)} stages in " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    plan = Plan(replace(experiment, stages=rehearsal_of(experiment, run).stages()), gpus=1)
    for name, stage in plan.stages.items():
        assert (run / name / "done.json").is_file()
        tars = sum(tar.stat().st_size for tar in (run / name).rglob("*.tar"))
        tensors = sum(map(tensor_bytes, (run / name).rglob("*.safetensors")))
        assert (tars > 0, tensors > 0) == (stage.serves("couplings"), stage.serves("model"))
        assert plan.cost_of(name).disk == pytest.approx(tars + tensors, rel=0.01 if tensors else 0)


def tensor_bytes(file: Path) -> int:
    """A .safetensors file without its header, which is much of a tiny model's."""
    with open(file, "rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_flow(tmp_path / "flow", "velocity")
    (tmp_path / "couplings").mkdir()
    return write(tmp_path, TEXT.replace("FLOW", "flow").replace("OTHER", "couplings"), "mine.yaml")


def test_a_rehearsal_runs_on_tiny_models_of_the_same_format_and_goes_on_where_it_stopped(config, tmp_path):
    stop_when(lambda: (tmp_path / "run-rehearsal/2rf/state.json").exists(), signal.SIGTERM, "rehearse", config)
    done = instaflow("rehearse", config)
    assert "pairs: done before" in done.stdout
    assert f"a tiny random model of its format in place of '{HUB}'" in done.stdout
    assert "in place of 'flow'" in done.stdout
    assert "3rf: couplings of a tiny model in place of 'couplings'" in done.stdout
    assert "captions.txt' is not here" in done.stdout
    assert "do not go to s3://bucket/pairs" in done.stdout
    run = tmp_path / "run-rehearsal"
    manifest = read_manifest(run / "pairs")
    assert (manifest.count, manifest.records_per_shard, manifest.plan.num_shards) == (16, 2, 8)
    assert manifest.latent_shape == (4, 8, 8)
    assert manifest.sampler["prediction_type"] == "v_prediction"  # as this hub model's is
    assert {"2rf", "3rf", "3rf-couplings"} <= {path.name for path in run.iterdir()}
    assert not (tmp_path / "run").exists()
    settings = json.loads((run / "3rf" / "model" / "instaflow.json").read_text())
    assert settings["kind"] == "flow"


def test_prompts_that_are_there_are_read(config, tmp_path):
    (tmp_path / "captions.txt").write_text("a lighthouse\n")
    experiment = load_experiment(config)
    made = rehearsal_of(experiment, tmp_path)
    assert made.settings["pairs"]["prompts"] == str(tmp_path / "captions.txt")
    assert made.settings["3rf-couplings"]["prompts"] == CAPTIONS


def test_counts_become_a_thousandth_and_never_too_few(tmp_path):
    experiment = load_experiment("sd15-instaflow")
    stages = rehearsal_of(experiment, tmp_path).stages()
    before, after = experiment.stages["2rf"], stages["2rf"]
    assert [phase.samples for phase in after.phases] == [4480, 25600]
    assert [phase.warmup_samples for phase in after.phases] == [64, 1024]
    assert [phase.global_batch_size for phase in after.phases] == [64, 1024]
    kept = ("mixed_precision", "negate_output_at_start", "ema_decay", "caption_dropout")
    assert all(getattr(before, key) == getattr(after, key) for key in kept)
    assert (stages["pairs"].count, stages["pairs"].records_per_shard) == (1600, 200)
    digits = rehearsal_of(load_experiment("digits"), tmp_path).stages()
    assert digits["teacher"].phases[0].samples == 2 * 64
    assert (digits["pairs"].count, digits["pairs"].records_per_shard) == (2 * 84, 84)
    assert digits["report"].num_samples == 128


def test_an_evaluation_looks_by_a_tiny_network_in_place_of_one_that_is_not_made_here(tmp_path):
    change = "stages.report.perceptual={network: alex, weights: nowhere.pth}"
    made = rehearsal_of(load_experiment("digits", [change]), tmp_path)
    assert made.settings["report"]["perceptual"] == {"network": str(tmp_path / ".tiny" / "perceptual")}
    assert made.perceptual and "report: a tiny random perceptual network in place of 'alex'" in made.changes


def test_what_is_small_already_stays(tmp_path):
    text = TEXT.replace(
        "3rf: {kind: reflow, init: FLOW, couplings: OTHER", "3rf: {kind: reflow, init: 2rf, couplings: pairs"
    )
    experiment = load_experiment(write(tmp_path, text), ["stages.pairs.count=3"])
    made = rehearsal_of(experiment, tmp_path).stages()
    assert (made["pairs"].count, made["pairs"].records_per_shard) == (3, 2)
    assert made["2rf"].phases == experiment.stages["2rf"].phases


def test_a_run_is_not_rehearsed_over_and_another_rehearsal_is(config, tmp_path):
    made = rehearsal_of(load_experiment(config), tmp_path)
    real = tmp_path / "real"
    (real / "pairs").mkdir(parents=True)
    (real / "pairs" / "stage.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run, not a rehearsal: its stage 'pairs'"):
        settle(real, made)
    assert (real / "pairs" / "stage.json").exists()

    settle(tmp_path / "own", made)
    (tmp_path / "own" / "pairs").mkdir()
    (tmp_path / "own" / "pairs" / "stage.json").write_text("{}")
    settle(tmp_path / "own", made)  # the same once more goes on
    assert (tmp_path / "own" / "pairs").exists()
    settle(tmp_path / "own", rehearsal_of(load_experiment(config, ["stages.pairs.num_steps=3"]), tmp_path))
    assert not (tmp_path / "own" / "pairs").exists()


def test_micro_batches_are_checked_as_they_are_written(config):
    found = instaflow("rehearse", config, "--set", "stages.2rf.micro_batch_size=3", expect=1)
    assert "cannot share evenly" in found.stderr


def test_an_experiment_of_evaluations_on_real_images_alone_is_none_to_rehearse(typed, tmp_path):
    (model := tmp_path / "model").mkdir()
    report = {"kind": "evaluate", "protocol": "coco2017-5k", "captions": "c.json", "real": "val"}
    rows = {"models": [{"model": str(model), "num_steps": [1]}], "reference": {"model": str(model), "num_steps": 1}}
    stages = {"report": {**report, **rows}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"run": "runs/one", "stages": stages}))
    code, _, err = typed("rehearse", tmp_path / "one.yaml", "--run-dir", tmp_path / "run")
    assert code == 1 and "has no stage to rehearse" in err and "num_samples=50" in err
