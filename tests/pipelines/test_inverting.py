"""Couplings of real images: made, resumed, verified, repaired, looked at, and mixed into a reflow."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.config import load_experiment
from instaflow.couplings.description import describe
from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import read_shard, read_sidecar, tar_path, write_shard
from instaflow.couplings.verify import bad_shards, verify
from instaflow.digits.captions import digits_named
from instaflow.digits.images import real_digits
from instaflow.errors import ConfigError, DataError, InstaFlowError, Interrupted
from instaflow.interruption import Stop
from instaflow.world import ALONE, Worker
from pipelines.couple import repair
from pipelines.experiment import run_all, run_one
from pipelines.inspect import draw_sheet
from pipelines.plan import Plan
from pipelines.rehearse import rehearsal_of
from tests.experiments import PHASE
from tests.models.made import load, write_model
from tests.pipelines.test_couple import stop_after_a_shard
from tests.test_image_files import write_folder

STAGE = (
    "{kind: couple, model: MODEL, data: DATA, count: 11, records_per_shard: 4, batch_size: 3, num_steps: 3, "
    "guidance_scale: 2}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images, number 5 damaged, and number 7 the same as number 2, caption included."""
    files, draw = {}, np.random.default_rng(0)
    for index in range(11):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8)).save(buffer, "png")
        files[f"{index:03d}.png"], files[f"{index:03d}.txt"] = buffer.getvalue(), f"picture {index}".encode()
    files["005.png"] = files["005.png"][:200]
    files["007.png"], files["007.txt"] = files["002.png"], files["002.txt"]
    return write_folder(tmp_path_factory.mktemp("data") / "images", files)


@pytest.fixture
def config(tmp_path, teacher, images):
    return write(tmp_path, teacher, images)


def write(folder, model, data, stage=STAGE, more=""):
    text = (
        f"run: {folder}/run\nstages:\n  pairs: {stage.replace('MODEL', str(model)).replace('DATA', str(data))}\n{more}"
    )
    (folder / "real.yaml").write_text(text)
    return str(folder / "real.yaml")


def couple(config, run, *, stop=None, worker=ALONE):
    run_one(load_experiment(config, (), str(run)), "pairs", stop or Stop(), worker)
    return run / "pairs"


def shards(folder):
    return {file.name: file.read_bytes() for file in (folder / "shards").iterdir()}


def records(folder):
    plan = read_manifest(folder).plan
    return [read_shard(folder, read_sidecar(folder, shard, plan)) for shard in range(plan.num_shards)]


def test_real_images_are_encoded_and_followed_back_to_noise(config, tmp_path, teacher, images):
    folder = couple(config, tmp_path / "run")
    made = records(folder)
    indices = [index for shard in made for index in shard.indices]
    assert indices == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert read_sidecar(folder, 1, read_manifest(folder).plan).left_out == (5,)
    prompts = [prompt for shard in made for prompt in shard.prompts]
    assert prompts[:3] == ["picture 0", "picture 1", "picture 2"] and prompts[6] == "picture 2"
    model = load(teacher)
    pixels = [
        np.asarray(Image.open(images / f"{index:03d}.png").crop((2, 0, 22, 20)).resize((16, 16), 1)) for index in (0, 1)
    ]
    latents = model.encode_images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1)
    np.testing.assert_allclose(made[0].latent[:2].astype(np.float32), latents, atol=0.04)
    stored = torch.from_numpy(made[0].latent.astype(np.float32))
    noise = model.inverted(stored, made[0].prompts, num_steps=3, guidance_scale=2.0)
    np.testing.assert_allclose(made[0].noise.astype(np.float32), noise, rtol=2e-3, atol=2e-3)


def test_interrupted_and_shared_it_ends_with_the_same_bytes(config, tmp_path):
    alone = couple(config, tmp_path / "alone")
    with pytest.raises(Interrupted):
        couple(config, tmp_path / "run", stop=stop_after_a_shard(tmp_path / "run"))
    couple(config, tmp_path / "run", worker=Worker(1, 2))
    couple(config, tmp_path / "run", worker=Worker(0, 2))
    assert shards(tmp_path / "run" / "pairs") == shards(alone)


def test_it_is_verified_and_repaired_as_any_other(config, tmp_path):
    folder = couple(config, tmp_path / "run")
    before = shards(folder)
    assert verify(folder) == []  # an image that stands twice has the same noise twice
    tar_path(folder, 1).write_bytes(b"")
    assert bad_shards(verify(folder)) == [1] and repair(folder) == [1] and shards(folder) == before
    tar_path(folder, 2).unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert repair(tmp_path / "moved" / "pairs") == [2] and shards(tmp_path / "moved" / "pairs") == before


def rewritten(records, **changes):
    parts = {"noise": records.noise, "latent": records.latent, "prompts": records.prompts, "indices": records.indices}
    return Shard(**(parts | changes))


def test_noise_that_no_inversion_gives_is_found(config, tmp_path):
    folder = couple(config, tmp_path / "run")
    first, _, last = records(folder)
    for noise, fault in (
        (first.noise * np.float16("nan"), "noise that is not finite"),
        (first.noise * np.float16(99), "record 0's noise, which has root mean square"),
        (first.noise / np.float16(999), "record 0's noise, which has root mean square"),
    ):
        write_shard(folder, 0, rewritten(first, noise=noise), left_out=[])
        assert fault in verify(folder)[0].fault and bad_shards(verify(folder)) == [0]
    write_shard(folder, 0, first, left_out=[])
    write_shard(folder, 2, rewritten(last, noise=first.noise[[0, 1, 3]]), left_out=[])
    problem = next(problem for problem in verify(folder) if problem.shard == 2)
    assert "holds in record 8 the noise of record 0" in problem.fault and "2 more such pairs" in problem.fault
    assert repair(folder) == [2] and verify(folder) == []


def test_repair_wants_the_images_that_were_inverted(config, tmp_path, images):
    data = shutil.copytree(images, tmp_path / "data")
    config = write(tmp_path, load_experiment(config).stages["pairs"].model, data)
    folder = couple(config, tmp_path / "run")
    tar_path(folder, 0).unlink()
    (data / "001.txt").write_text("another caption")
    with pytest.raises(DataError, match="inverted from are not at"):
        repair(folder)
    with pytest.raises(ConfigError, match="'data' was '"):
        couple(config, tmp_path / "run")
    shutil.rmtree(data)
    with pytest.raises(DataError, match="inverted from are not at"):
        repair(folder)
    couple(config, tmp_path / "run")  # done, it needs them no more


def test_what_it_holds_is_told_and_seen(config, tmp_path):
    folder = couple(config, tmp_path / "run")
    told = "\n".join(describe(folder, read_manifest(folder)))
    assert "found by inversion" in told and "real images, '" in told and "Inversion, 3 steps" in told
    assert "4 pairs" in draw_sheet(folder, tmp_path / "sheet.png", count=4)


def test_what_is_left_out_does_not_count(config, tmp_path, capsys):
    couple(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "pairs: 10 couplings in " in told
    assert "pairs: left out 1 coupling: images that cannot be read or lead to no noise" in told


def test_nothing_but_images_that_cannot_be_read_is_no_stage_that_is_done(tmp_path, teacher):
    files = {f"{index}.{end}": b"no image" for index in range(3) for end in ("png", "txt")}
    stage = STAGE.replace("count: 11", "count: 3")
    config = write(tmp_path, teacher, write_folder(tmp_path / "images", files), stage)
    with pytest.raises(DataError, match="made no coupling: no image can be read and inverted"):
        couple(config, tmp_path / "run")
    assert not (tmp_path / "run" / "pairs" / "done.json").exists()


def test_digits_come_with_true_captions_drawn_by_the_seed(tmp_path, teacher):
    config = write(tmp_path, teacher, "digits")
    found = [shard.prompts for shard in records(couple(config, tmp_path / "run"))]
    prompts = [prompt for shard in found for prompt in shard]
    assert all(
        label in digits_named(prompt) for label, prompt in zip(real_digits()[1][:11].tolist(), prompts, strict=True)
    )
    assert verify(tmp_path / "run" / "pairs") == []
    other = load_experiment(config, ("seed=1",), str(tmp_path / "other"))
    run_one(other, "pairs", Stop())
    assert [shard.prompts for shard in records(tmp_path / "other" / "pairs")] != found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("prompts=[a seven]",), "give either prompts, to sample from noise, or data, to invert"),
        (("data=null",), "give either prompts"),
        (("sampler=ddim", "num_steps=10"), "sampler goes with prompts"),
        (("keep={embeddings: true}",), "keep goes with prompts"),
        (("compile=true",), "compile goes with prompts"),
    ],
)
def test_settings_that_an_inversion_has_not_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(config, [f"stages.pairs.{change}" for change in changes])


def test_more_than_there_are_is_refused_before_any_work(config, tmp_path, teacher):
    with pytest.raises(ConfigError, match=r"'stages.pairs.count' is 12; of '.*', 11 of 11 images taken"):
        run_one(load_experiment(config, ("stages.pairs.count=12",), str(tmp_path / "run")), "pairs", Stop())
    digits = load_experiment(write(tmp_path, teacher, "digits"), ("stages.pairs.count=1798",), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"is 1,798; 'digits' holds 1,797 images"):
        run_one(digits, "pairs", Stop())
    assert not (tmp_path / "run").exists()


def test_a_relative_place_lies_beside_the_experiment(tmp_path, teacher):
    found = load_experiment(write(tmp_path, teacher, "images")).stages["pairs"].data
    assert found == str(tmp_path / "images")
    assert load_experiment(write(tmp_path, teacher, "s3://bucket/images")).stages["pairs"].data == "s3://bucket/images"


# --- mixed into a reflow ----------------------------------------------------------------------------------------------

MIXED = f"""
  drawn: {{kind: couple, model: MODEL, prompts: [a seven], count: 8, num_steps: 2, guidance_scale: 1}}
  2rf: {{kind: reflow, init: MODEL, couplings: drawn, real: {{couplings: pairs, share: 0.5}}, preview: null,
    phases: [{PHASE}]}}
"""


@pytest.fixture
def mixed(tmp_path, teacher):
    return write(tmp_path, teacher, "digits", more=MIXED.replace("MODEL", str(teacher)))


def test_a_reflow_trains_on_both(mixed, tmp_path, monkeypatch):
    from pipelines import on_couplings

    jobs, train = [], on_couplings.train
    monkeypatch.setattr(on_couplings, "train", lambda job, *rest: jobs.append(job) or train(job, *rest))
    experiment = load_experiment(mixed)
    run_all(experiment, Stop())
    lineage = json.loads((tmp_path / "run" / "2rf" / "model" / "instaflow.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage[-3:]] == ["drawn", "pairs", "2rf"]
    assert (
        "11 real images inverted" in lineage[-2]["summary"]
        and "50.0% of them real, from pairs" in lineage[-1]["summary"]
    )
    noise, _, prompts = jobs[0].batch(0, 64)
    drawn = sum(prompt == "a seven" for prompt in prompts)
    assert 20 <= drawn <= 44 and len({one.numpy().tobytes() for one in noise}) == 8 + 11
    assert (
        jobs[0].describe(0, 64)
        == "records of shard 00000 of 'drawn' and records of shards 00000, 00001, 00002 of 'pairs'"
    )
    identity = json.loads((tmp_path / "run" / "2rf" / "stage.json").read_text())["identity"]
    assert {"couplings (content)", "real.couplings (content)"} <= identity.keys()
    with pytest.raises(ConfigError, match=r"'real.share' was 0.5, is now 0.25"):
        run_one(load_experiment(mixed, ("stages.2rf.real.share=0.25",)), "2rf", Stop())


def test_a_reflow_waits_for_its_real_couplings(mixed):
    experiment = load_experiment(mixed)
    run_one(experiment, "drawn", Stop())
    with pytest.raises(InstaFlowError, match="builds on 'pairs', which is not done") as caught:
        run_one(experiment, "2rf", Stop())
    assert "couple" in caught.value.hint and "--stage pairs" in caught.value.hint


def test_real_couplings_of_another_shape_are_refused(mixed, tmp_path):
    experiment = load_experiment(mixed)
    for name in ("drawn", "pairs"):
        run_one(experiment, name, Stop())
    manifest = tmp_path / "run" / "pairs" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"latent_shape": [4, 16, 16]}))
    with pytest.raises(ConfigError, match=r"the couplings 'pairs' hold latents of shape \(4, 16, 16\)"):
        run_one(experiment, "2rf", Stop())


@pytest.mark.parametrize("share", ["0", "1", "1.5"])
def test_a_share_is_between_none_and_all(mixed, share):
    with pytest.raises(ConfigError, match=r"stages.2rf.real.share"):
        load_experiment(mixed, (f"stages.2rf.real.share={share}",))


def test_only_a_reflow_takes_real_couplings(mixed):
    with pytest.raises(ConfigError, match=r"'stages.2rf' has no setting 'real'"):
        load_experiment(mixed, ("stages.2rf.kind=distill",))


def test_a_plan_counts_encoding_and_heun_s_calls(mixed):
    plan = Plan(load_experiment(mixed), 1)
    flops = plan.architecture(plan.stages["pairs"].model).flops()
    assert plan.cost_of("pairs").flops == 11 * (2 * (2 * 3 + 1) * flops["unet"] + flops["text"] + flops["encode"])


def test_a_rehearsal_makes_up_what_is_not_there(tmp_path, teacher):
    text = MIXED.replace("MODEL", str(teacher)).replace("couplings: pairs", f"couplings: {teacher}")
    config = write(tmp_path, teacher, "images", more=text)
    made = rehearsal_of(load_experiment(config, ("stages.pairs.count=50000000",)), tmp_path)
    assert made.settings["pairs"]["data"] == "digits" and made.settings["pairs"]["count"] == 1000
    added = made.settings["2rf"]["real"]["couplings"]
    assert made.settings[added]["kind"] == "couple" and made.stages()["2rf"].parents()["real.couplings"] == added
    assert any("digits in place of the images of" in line for line in made.changes)
