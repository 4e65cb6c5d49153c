"""`instaflow show` on models of a run, exported ones and others."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from instaflow.models.samplers import flow_scheduler
from tests.models.made import teacher_scheduler, write_model, write_published


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
    (tmp_path / "sheet.webp").touch()
    code, _, err = typed("show", tmp_path / "sheet.webp")
    assert code == 1 and "'instaflow sample' made" in err.replace("`", "'")
    code, out, _ = typed("show", folder)
    assert (
        code == 0
        and "25 steps, guidance 1.5, moving average of the weights." in out
        and "- 2rf (reflow): rectified flow" in out
    )
    assert typed("show", tmp_path / "nothing")[0] == 1
    shutil.rmtree(folder / "unet")
    code, _, err = typed("show", folder)
    assert code == 1 and "lacks unet" in err
    _, out, _ = typed("show", write_published(tmp_path / "elsewhere", "sd1"))
    assert "A teacher: parametrization epsilon, 25 steps, guidance 7.5." in out  # of its weights nobody knows


@pytest.mark.parametrize("to", ["diffusers", "instaflow", "single-file", "lora", "delta", "onnx"])
def test_an_exported_folder_tells_where_it_comes_from(typed, tmp_path, to):
    lineage = [{"stage": "student", "kind": "distill", "summary": "one step"}]
    student = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}
    folder = write_model(
        tmp_path / "student", flow_scheduler("velocity", teacher_scheduler()), **student, lineage=lineage
    )
    write_model(tmp_path / "teacher")
    weights = load_file(file := folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"] + 0.1}, file, {"format": "pt"})
    code, out, err = typed("export", folder, tmp_path / "out", "--to", to, "--teacher", tmp_path / "teacher")
    assert code == 0, err
    ruined = "call it with guidance_scale=1.0"
    assert (ruined in out) is (ruined in (tmp_path / "out" / "README.md").read_text()) is (to != "diffusers")
    code, out, err = typed("show", tmp_path / "out")
    assert code == 0, err
    assert "A student: parametrization velocity, 1 step, no guidance" in out and "- student (distill): one step" in out
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert typed("show", file)[1].partition("\n")[2] == out.partition("\n")[2]
    if to != "diffusers":
        code, _, err = typed("export", folder, tmp_path / "other", "--to", to, "--lock-guidance")
        assert code == 1 and "no place for a lock" in err and not (tmp_path / "other").exists()
