"""A couple stage that keeps images, embeddings and the trajectory besides its pairs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.config import load_experiment
from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.records import read_extra
from instaflow.couplings.shards import read_shard, read_sidecar, tar_path
from instaflow.couplings.verify import verify
from instaflow.errors import ConfigError
from instaflow.interruption import Stop
from pipelines.couple import repair
from pipelines.experiment import run_one
from tests.couplings.made import contents
from tests.models.made import load, write_flow, write_model, write_published

TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven, an odd digit], count: 10, records_per_shard: 6, batch_size: 4,
     num_steps: 5, guidance_scale: 2}
"""
KEEP = "stages.pairs.keep={images: {every: 3, format: png}, embeddings: true, trajectory: [0.2, 0.5, 0.9]}"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_model(place / "teacher"),
        "velocity": write_flow(place / "velocity", "velocity"),
        "xl": write_published(place / "xl", "xl"),
    }


def couple(place: Path, run: Path, *overrides: str) -> Path:
    config = run.with_suffix(".yaml")
    config.write_text(TEXT.replace("MODEL", str(place)))
    run_one(load_experiment(str(config), overrides, str(run)), "pairs", Stop())
    return run / "pairs"


def records(folder: Path):
    """Every shard's records."""
    plan = read_manifest(folder).plan
    return [read_shard(folder, read_sidecar(folder, shard, plan)) for shard in range(plan.num_shards)]


def kept(shard, name: str) -> dict[int, np.ndarray]:
    return {index: read_extra(name, content) for index, content in shard.extras[name].items()}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("teacher", ["stages.pairs.sampler=heun"]), ("velocity", []), ("xl", []), ("xl", ["stages.pairs.dtype=float16"])],
)
def test_records_hold_what_was_asked_for_and_the_same_pairs(places, tmp_path, name, overrides):
    folder = couple(places[name], tmp_path / "kept", KEEP, *overrides)
    plain = couple(places[name], tmp_path / "plain", *overrides)
    manifest = read_manifest(folder)
    assert verify(folder) == [] and read_manifest(plain).keep is None
    model = load(places[name], torch.float16 if overrides == ["stages.pairs.dtype=float16"] else torch.float32)
    for shard, bare in zip(records(folder), records(plain), strict=True):
        np.testing.assert_array_equal(shard.noise, bare.noise)
        np.testing.assert_array_equal(shard.latent, bare.latent)
        assert bare.extras == {}
        for index in shard.indices:
            members = {field: files[index] for field, files in shard.extras.items() if index in files}
            shapes = {field: read_extra(field, content).shape for field, content in members.items()}
            assert shapes == manifest.keep.members(index, manifest.latent_shape)
        for row, index in enumerate(shard.indices):
            hidden, pooled = model.embed([shard.prompts[row]])
            np.testing.assert_allclose(kept(shard, "embedding.npy")[index], hidden[0].numpy(), rtol=1e-2, atol=2e-3)
            if pooled is not None:
                np.testing.assert_allclose(kept(shard, "pooled.npy")[index], pooled[0].numpy(), rtol=1e-2, atol=2e-3)
        images = kept(shard, "image.png")
        assert list(images) == [index for index in shard.indices if index % 3 == 0]
        for index, image in images.items():
            latent = torch.from_numpy(shard.latent[shard.indices.index(index)]).float()[None]
            np.testing.assert_allclose(image, model.pictures(latent)[0], atol=3)  # of the latent before it was rounded
    assert ("pooled" in np.load(folder / "no-prompt.npz")) == (name == "xl")
    np.testing.assert_allclose(
        np.load(folder / "no-prompt.npz")["embedding"], model.embed([None])[0][0].numpy(), rtol=1e-2, atol=2e-3
    )


def test_the_trajectory_of_a_flow_is_eulers_path(places, tmp_path):
    folder = couple(places["velocity"], tmp_path / "run", "stages.pairs.keep={trajectory: [0.2, 0.5, 0.9]}")
    times, model = read_manifest(folder).keep.trajectory, load(places["velocity"])
    assert times == pytest.approx([0.2, 0.4, 0.8], abs=0.002)  # what 5 steps visit
    for shard in records(folder):
        start = torch.from_numpy(shard.noise).float()
        path = model.trajectory(start, shard.prompts, num_steps=5, guidance_scale=2.0)
        steps = [int((path.times - time).abs().argmin()) for time in times]
        found = np.stack(list(kept(shard, "trajectory.npy").values()), 1)
        np.testing.assert_allclose(found, path.states[steps], rtol=2e-3, atol=2e-3)
    assert not (folder / "no-prompt.npz").exists()


def test_repair_makes_what_is_kept_again(places, tmp_path):
    folder = couple(places["teacher"], tmp_path / "run", KEEP)
    before = contents(folder / "shards")
    tar_path(folder, 1).write_bytes(before["00001.tar"][:-512])
    assert repair(folder) == [1]
    assert contents(folder / "shards") == before


def test_a_store_holds_the_embeddings_of_no_prompt_too(places, tmp_path):
    output = f"stages.pairs.output=file://{tmp_path}/store"
    folder = couple(places["teacher"], tmp_path / "run", "stages.pairs.keep={embeddings: true}", output)
    assert (tmp_path / "store" / "no-prompt.npz").read_bytes() == (folder / "no-prompt.npz").read_bytes()
    assert verify(folder) == []


def test_the_default_image_is_webp_as_every_reader_opens_it(places, tmp_path):
    folder = couple(places["teacher"], tmp_path / "run", "stages.pairs.keep={images: {every: 4}}")
    (first, second) = records(folder)
    assert list(first.extras) == ["image.webp"]
    assert [*first.extras["image.webp"], *second.extras["image.webp"]] == [0, 4, 8]
    assert Image.open(io.BytesIO(first.extras["image.webp"][4])).size == (16, 16)


def test_times_at_one_state_are_refused_before_anything_is_sampled(places, tmp_path):
    with pytest.raises(ConfigError, match="both come to the state"):
        couple(places["teacher"], tmp_path / "run", "stages.pairs.keep={trajectory: [0.5, 0.51]}")
    assert not (tmp_path / "run" / "pairs" / "shards").exists()


def test_keeping_more_is_another_stage(places, tmp_path):
    couple(places["teacher"], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'keep\.images\.every' was absent, is now 3"):
        couple(places["teacher"], tmp_path / "run", KEEP)
