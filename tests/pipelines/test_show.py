"""`instaflow show` on models of a run, exported ones and others."""

import json
import shutil

import pytest

from tests.models.made import write_model


@pytest.mark.slow
def test_a_runs_student_and_its_export(typed, small_run, tmp_path):
    model = small_run / "student" / "model"
    code, out, _ = typed("show", model)
    assert code == 0
    places = [out.index(f"- {name} (") for name in ("teacher", "pairs", "2rf", "pairs2", "student")]
    assert places == sorted(places)
    for name in ("teacher", "pairs", "2rf", "pairs2", "student"):
        assert json.loads((small_run / name / "done.json").read_text())["fingerprint"][:16] in out
    assert "phase 1:" in out and "Fréchet distance to real images" in out and "protocol:" in out
    assert typed("export", model, tmp_path / "out", "--to", "diffusers")[0] == 0
    _, again, _ = typed("show", tmp_path / "out")
    assert again.partition("## Where")[2] == out.partition("## Where")[2]
    assert again.partition("## Where")[2].strip() in (tmp_path / "out" / "README.md").read_text()


def test_a_model_alone(typed, tmp_path):
    lineage = [{"stage": "2rf", "kind": "reflow", "summary": "rectified flow"}]
    folder = write_model(tmp_path / "alone", kind="flow", num_steps=25, guidance_scale=1.5, lineage=lineage)
    code, out, _ = typed("show", folder)
    assert code == 0 and "25 steps, guidance 1.5" in out and "- 2rf (reflow): rectified flow" in out
    assert typed("show", tmp_path / "nothing")[0] == 1
    shutil.rmtree(folder / "unet")
    code, _, err = typed("show", folder)
    assert code == 1 and "lacks unet" in err
