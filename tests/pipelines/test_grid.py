"""The digits in a square, from teacher to report, by the real command at the least counts."""

import json

import pytest
from safetensors import safe_open

from instaflow.couplings.manifest import read_manifest
from pipelines.plan import digits_architecture
from tests.experiments import PHASE
from tests.pipelines.runs import ROOT, instaflow

TEXT = f"""
run: unused
stages:
  teacher: {{kind: teacher, data: digits-grid, guidance_scale: 2, phases: [{PHASE}], autoencoder_phases: [{PHASE}],
    text_phases: [{PHASE}]}}
  pairs: {{kind: couple, model: teacher, prompts: {ROOT}/configs/digits-grid-prompts.txt, count: 8, num_steps: 2,
    guidance_scale: 1}}
  student: {{kind: distill, init: teacher, couplings: pairs, phases: [{PHASE}]}}
  report:
    kind: evaluate
    protocol: digits-grid
    models: [{{model: teacher, num_steps: [2]}}, {{model: student, num_steps: [1]}}]
    reference: {{model: teacher, num_steps: 2}}
    num_samples: 32
    straightness_samples: 2
    straightness_steps: 2
  single:
    kind: evaluate
    protocol: digits
    models: [{{model: student, num_steps: [1]}}]
    reference: {{model: student, num_steps: 1}}
"""


@pytest.mark.slow
def test_a_grid_goes_from_teacher_to_report_and_single_digits_are_not_its_protocol(tmp_path):
    (tmp_path / "grid.yaml").write_text(TEXT)
    run = tmp_path / "run"
    failed = instaflow("run", tmp_path / "grid.yaml", "--run-dir", run, expect=1)
    assert "'single': protocol digits goes with prompts of 10 tokens, and 'student' takes 20" in failed.stderr
    assert read_manifest(run / "pairs").latent_shape == (4, 8, 8)

    planned = digits_architecture("digits-grid")
    assert (planned.image_size, planned.latent_shape) == ((32, 32), (4, 8, 8))
    (weights,) = (run / "student" / "model" / "unet").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  (no dict)
    assert parameters == planned.parameters()["unet"]

    report = json.loads((run / "report" / "report.json").read_text())
    assert [row["num_samples"] for row in report["rows"]] == [32, 32]
    assert all(0 <= row["prompt_accuracy"] <= 1 and row["frechet_distance_real"] > 0 for row in report["rows"])
    assert report["protocol"]["judged"] == "named cells"
    assert report["gaps"]["worst"][0]["student_reading"].count(" / ") == 1
    page = (run / "report" / "report.html").read_text()
    assert "of named cells drawn right" in page
    assert "Named cells not drawn right" in page
    assert "rompts drawn right" not in page and "rompts not drawn right" not in page
