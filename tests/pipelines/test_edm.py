"""EDMs of pixels through the stages: teacher, couplings, reflow, distillation, report, and what they refuse."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline
from safetensors.torch import save_file

from cli import cli
from instaflow.config import load_experiment
from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.shards import read_shard, read_sidecar
from instaflow.couplings.verify import verify
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.models.edm_heun import EdmHeunScheduler
from instaflow.models.settings import read_settings
from instaflow.rundir import stage_folders
from pipelines.couple import repair
from pipelines.experiment import module_of
from pipelines.import_edm import run as import_edm
from pipelines.inspect import draw_sheet
from pipelines.sample import run as sample
from pipelines.sample_request import Request, wanted_by
from tests.models.adm_reference import Adm
from tests.models.made import load
from tests.pipelines.runs import instaflow

PHASE = "{samples: 64, global_batch_size: 16, learning_rate: 1e-3}"
TEXT = f"""
run: unused
stages:
  teacher: {{kind: teacher, method: edm, data: digits, phases: [{PHASE}], ema_decay: 0.5, num_steps: 4}}
  pairs: {{kind: couple, model: teacher, prompts: ["0", seven, "2"], count: 32, records_per_shard: 16, batch_size: 16,
          num_steps: 3, guidance_scale: 1, keep: {{images: {{every: 8}}, trajectory: [0.3]}}}}
  2rf: {{kind: reflow, init: teacher, couplings: pairs, parametrization: epsilon, caption_dropout: 0, guidance_scale: 1,
        num_steps: 3, phases: [{PHASE}], preview: {{images: 4, grid: 2}}}}
  student: {{kind: distill, init: teacher, couplings: pairs, parametrization: epsilon, phases: [{PHASE}],
            preview: {{images: 4, grid: 2}}}}
  report:
    kind: evaluate
    protocol: digits
    models: [{{model: teacher, num_steps: [4, 1]}}, {{model: 2rf, num_steps: [3]}}, {{model: student, num_steps: [1]}}]
    reference: {{model: teacher, num_steps: 4}}
    num_samples: 64
    straightness_samples: 4
    straightness_steps: 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    (folder / "edm.yaml").write_text(TEXT)
    instaflow("run", folder / "edm.yaml", "--run-dir", folder / "run")
    return folder / "run"


def test_every_stage_writes_an_edm(run):
    for name, kind, steps in (("teacher", "teacher", 4), ("2rf", "flow", 3), ("student", "student", 1)):
        settings = read_settings(run / name / "model")
        assert (settings.kind, settings.parametrization, settings.num_steps) == (kind, "edm", steps)
        assert settings.guidance_scale == 1
        stock = ConsistencyModelPipeline.from_pretrained(run / name / "model")
        assert type(stock.scheduler).__name__ == (
            "EDMDPMSolverMultistepScheduler" if kind == "teacher" else "EDMEulerScheduler"
        )
    assert len(read_settings(run / "student" / "model").class_names) == 10
    raw, average = (load(run / "teacher" / name).unet.conv_in.weight for name in ("model-raw", "model"))
    assert not torch.equal(raw, average)
    losses = [
        json.loads(line)["loss"]
        for line in (run / "teacher" / "stats.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]


def test_couplings_are_heuns(run):
    manifest = read_manifest(run / "pairs")
    assert manifest.sampler["class"] == "EdmHeunScheduler" and manifest.latent_shape == (3, 16, 16)
    shard = read_shard(run / "pairs", read_sidecar(run / "pairs", 0, manifest.plan))
    assert shard.prompts[:4] == ["0", "seven", "2", "0"]
    teacher = load(run / "teacher" / "model")
    noise = torch.from_numpy(shard.noise.astype(np.float32))
    made = teacher.sample(noise, ["0", "7", "2"] * 5 + ["0"], num_steps=3, scheduler=EdmHeunScheduler())
    np.testing.assert_allclose(shard.latent, made.half().numpy(), atol=2e-3)
    (time,) = manifest.keep.trajectory
    assert time == pytest.approx(1 / (1 + float(teacher.view().levels(torch.tensor(0.5)))), abs=1e-6)


def test_couplings_are_verified_seen_and_repaired(run, tmp_path):
    pairs = shutil.copytree(run, tmp_path / "run") / "pairs"
    assert verify(pairs, workers=1) == []
    assert "4 pairs, images by the model's own VAE" in draw_sheet(pairs, tmp_path / "pairs.png", count=4)
    whole = (pairs / "shards" / "00001.tar").read_bytes()
    (pairs / "shards" / "00001.tar").write_bytes(whole[:1000])
    assert repair(pairs) == [1] and (pairs / "shards" / "00001.tar").read_bytes() == whole


def test_the_report(run):
    report = json.loads((run / "report" / "report.json").read_text())
    assert [(row["model"], row["num_steps"]) for row in report["rows"]] == [
        ("teacher", 4),
        ("teacher", 1),
        ("2rf", 3),
        ("student", 1),
    ]
    assert all(0 <= row["prompt_accuracy"] <= 1 and row["frechet_distance_real"] > 0 for row in report["rows"])
    assert report["floors"]["autoencoder"] == pytest.approx(0, abs=1e-6)  # there is none


def test_images_of_a_student(run, tmp_path):
    def sampled(*prompts):
        files = {"latents_file": tmp_path / "pixels.npy", "output": f"{tmp_path}/grid.png"}
        request = Request(models=(str(run / "student" / "model"),), prompts=prompts, **files)
        return sample(request, wanted_by(request))

    told = sampled("seven", "0")
    assert "2 images, 1 step" in told and np.load(tmp_path / "pixels.npy").shape == (2, 3, 16, 16)
    with pytest.raises(DataError, match="is no class"):
        sampled("a seven")


REFUSED = [
    ("student", "parametrization=velocity", "can't read timesteps to 1000"),
    ("2rf", "parametrization=rectified-diffusion", "can't read timesteps to 1000"),
    ("2rf", "guidance_scale=1.5", "of which guidance_scale knows nothing"),
    ("2rf", "caption_dropout=0.1", "knows images of a class alone"),
    ("student", "stacked=true", "of which stacked knows nothing"),
    ("pairs", 'prompts=["3", a seven]', "'a seven' is no class"),
    ("pairs", "guidance_scale=2", "knows images of a class alone"),
    ("pairs", "keep.embeddings=true", "keep.embeddings"),
    ("pairs", "sampler=unipc", "knows no EDM"),
    ("report", "protocol=digits-grid", "protocol digits-grid goes with latents, and 'teacher' makes pixels"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=[change for _, change, _ in REFUSED])
def test_what_an_edm_cannot_do(run, tmp_path, name, change, words):
    refused(run, tmp_path, name, words, f"stages.{name}.{change}")


def test_halving_is_refused(run, tmp_path):
    halving = "{num_steps: 2, samples: 8, global_batch_size: 4, learning_rate: 1e-3}"
    parts = f"init: teacher, couplings: pairs, guidance_scale: 1, phases: [{halving}]"
    change = f"stages.student={{kind: distill, method: progressive, {parts}}}"
    refused(run, tmp_path, "student", "not every other one", change)


def refused(run, tmp_path, name, words, change):
    """The stage, asked for otherwise beside the others as they are done, says why not before it works."""
    (tmp_path / "edm.yaml").write_text(TEXT)
    for done in ("teacher", "pairs", "2rf", "student"):
        if done != name:
            shutil.copytree(run / done, tmp_path / "run" / done)
    stage = stage_folders(load_experiment(str(tmp_path / "edm.yaml"), [change], str(tmp_path / "run")))[name]
    stage.folder.mkdir(parents=True)
    module = __import__(f"pipelines.{module_of(stage.stage)}", fromlist=["run"])
    with pytest.raises(InstaFlowError) as caught:
        module.run(stage, lambda: False)
    assert words in f"{caught.value}" and isinstance(caught.value, ConfigError | DataError | InstaFlowError)
    assert not (stage.folder / "checkpoints").exists() and not (stage.folder / "shards").exists()


# --- import -----------------------------------------------------------------------------------------------------------


def test_an_imported_network_is_a_teacher(tmp_path):
    torch.manual_seed(0)
    network = Adm(8, 10).eval()
    save_file({f"model.{name}": value for name, value in network.state_dict().items()}, tmp_path / "adm.safetensors")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {number}" for number in range(10)))
    told = import_edm(tmp_path / "adm.safetensors", tmp_path / "imported", names)
    assert "images of 8×8, 10 classes" in told
    model = load(tmp_path / "imported")
    x, level = torch.randn(2, 3, 8, 8), torch.tensor(0.3)
    with torch.no_grad():
        wanted = network(x, level.expand(2), torch.eye(10)[[3, 0]])
    torch.testing.assert_close(
        model.predict(x, level, model.encode(["kind 3", "0"]), 1.0), wanted, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ConfigError, match="is there already"):
        import_edm(tmp_path / "adm.safetensors", tmp_path / "imported", None)
    names.write_text("one\ntwo\n")
    for lines, words in (
        (b"one\ntwo\n", "2 lines"),
        (b"\n".join(b"kind %d" % number for number in range(9)) + b"\n\n", "Line 10 of '.*' is blank"),
        ("b\u00e4r\n".encode("latin-1"), r"is not UTF-8 text \(byte 1\)"),
    ):
        names.write_bytes(lines)
        with pytest.raises(ConfigError, match=words):
            import_edm(tmp_path / "adm.safetensors", tmp_path / "other", names)
    assert not (tmp_path / "other").exists()


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "edm-imagenet-64x64-cond-adm.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(DataError, match="is a pickle") as caught:
        import_edm(tmp_path / "edm-imagenet-64x64-cond-adm.pkl", tmp_path / "imported", None)
    assert "import-edm --help" in caught.value.hint and not (tmp_path / "imported").exists()
    told = cli.commands["import-edm"].help
    assert "net.state_dict()" in told and "--precond=edm" in told
    with pytest.raises(DataError, match="There is no file"):
        import_edm(tmp_path / "missing.safetensors", tmp_path / "imported", None)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=re.escape("is no .safetensors file")):
        import_edm(tmp_path / "broken.safetensors", tmp_path / "imported", None)
