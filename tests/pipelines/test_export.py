"""`instaflow export`: each form as the programs read it that it is for."""

import numpy as np

from tests.models.made import noise, write_flow


def sampled(typed, model, folder):
    """The latents that `instaflow sample` makes of a model."""
    np.save(folder / "noise.npy", noise(1).numpy())
    words = ["--prompt", "the digit 7", "--noise-in", folder / "noise.npy", "--latents-out", folder / "out.npy"]
    code, _, err = typed("sample", model, *words, "--output", folder / "out.png")
    assert code == 0, err
    return np.load(folder / "out.npy")


def test_instaflow_and_back(typed, tmp_path):
    student = write_flow(tmp_path / "student", "velocity")
    code, out, _ = typed("export", student, tmp_path / "out", "--to", "instaflow")
    assert code == 0 and out.endswith(f"{tmp_path / 'out'}: for InstaFlow's RectifiedFlowPipeline\n")
    np.testing.assert_allclose(
        sampled(typed, tmp_path / "out", tmp_path), sampled(typed, student, tmp_path), rtol=0, atol=1e-4
    )
    assert "RectifiedFlowPipeline" in (tmp_path / "out" / "model_index.json").read_text()


def test_nothing_is_overwritten(typed, tmp_path):
    student = write_flow(tmp_path / "student", "velocity")
    code, _, err = typed("export", student, student, "--to", "instaflow")
    assert code == 1 and "is there already" in err
    code, _, err = typed("export", student, tmp_path / "no" / "out", "--to", "instaflow")
    assert code == 1 and "does not exist" in err
    code, _, err = typed("export", write_flow(tmp_path / "other", "epsilon"), tmp_path / "out", "--to", "instaflow")
    assert code == 1 and "InstaFlow's convention" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "student"]
