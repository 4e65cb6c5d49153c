"""The contact sheet of a couple stage; and its model, found again after a move."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.config import load_experiment
from instaflow.couplings.contact_sheet import GAP, MARGIN, TILE
from instaflow.couplings.manifest import place_of_model, read_manifest, write_manifest
from instaflow.couplings.records import Kept, KeptImages, Shard, write_extra
from instaflow.couplings.shards import read_shard, read_sidecar, shards_to_make, write_shard
from instaflow.errors import ConfigError, DataError
from instaflow.interruption import Stop
from pipelines.couple import repair
from pipelines.experiment import run_one
from pipelines.inspect import draw_sheet, spread_evenly
from tests.couplings.made import make_couplings, manifest_of
from tests.models.made import write_model

TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven], count: 12, records_per_shard: 4, num_steps: 2, guidance_scale: 2}
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder with a model outside the run, and the run in a folder of its own."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "pairs.yaml").write_text(TEXT.replace("MODEL", str(write_model(folder / "teacher"))))
    run_one(load_experiment(str(folder / "pairs.yaml"), (), str(folder / "run")), "pairs", Stop())
    return folder


def first_tiles(sheet: Path) -> np.ndarray:
    top = MARGIN + 3 * 24
    return np.asarray(Image.open(sheet).convert("RGB"))[top : top + TILE, MARGIN : MARGIN + 2 * TILE + GAP]


def test_pairs_are_decoded_by_the_model_s_vae(stage, tmp_path, monkeypatch):
    from instaflow.models import loading

    monkeypatch.setattr(loading, "load_pipeline", None)  # the other parts are not needed
    told = draw_sheet(stage / "run" / "pairs", tmp_path / "sheet.png", count=5)
    assert told == f"{tmp_path / 'sheet.png'}: 5 pairs, images by the model's own VAE"
    assert first_tiles(tmp_path / "sheet.png").std() > 10


def test_the_model_is_found_after_the_run_or_the_model_has_moved(stage, tmp_path):
    run = tmp_path / "elsewhere" / "deeper" / "run"
    shutil.copytree(stage / "run", run)
    manifest = read_manifest(run / "pairs")
    assert manifest.model == "../../teacher"  # as the stage saw it where it was made
    assert place_of_model(run / "pairs", manifest) == str(stage / "teacher")  # as the experiment file said
    tar = run / "pairs" / "shards" / "00001.tar"
    content = tar.read_bytes()
    tar.unlink()
    assert repair(run / "pairs") == [1] and tar.read_bytes() == content

    moved = shutil.copytree(stage / "teacher", tmp_path / "moved")
    settings = (run / "pairs" / "stage.json").read_text()
    (run / "pairs" / "stage.json").write_text(settings.replace(str(stage / "teacher"), "/gone"))
    sheet = tmp_path / "sheet.png"
    told = draw_sheet(run / "pairs", sheet, count=5)
    assert told.startswith("No contact sheet: the model is not at ") and not sheet.exists()
    assert draw_sheet(run / "pairs", sheet, count=1, model=str(moved)).startswith(f"{sheet}: 1 pair, ")
    tar.unlink()
    with pytest.raises(DataError, match="is not at") as caught:
        repair(run / "pairs")
    assert "--model PLACE" in caught.value.hint
    assert repair(run / "pairs", model=str(moved)) == [1] and tar.read_bytes() == content
    (moved / "README.md").write_text("changed")
    tar.unlink()
    with pytest.raises(DataError, match="is not the model that made the couplings"):
        repair(run / "pairs", model=str(moved))
    assert not sheet.unlink() and "is not the model" in draw_sheet(run / "pairs", sheet, count=1, model=str(moved))


def test_where_there_is_no_model_kept_images_are_shown(tmp_path):
    folder = make_couplings(tmp_path / "pairs", manifest_of())
    plan = manifest_of().plan
    for shard in range(plan.num_shards):
        records = read_shard(folder, read_sidecar(folder, shard, plan))
        images = {
            i: write_extra("image.png", np.full((4, 4, 3), 10 * i, np.uint8)) for i in records.indices if i % 2 == 0
        }
        kept = Shard(records.noise, records.latent, records.prompts, records.indices, {"image.png": images})
        write_shard(folder, shard, kept, left_out=[])
    sheet = tmp_path / "sheet.png"
    assert draw_sheet(folder, sheet, count=5).endswith("and the shards keep no images")  # none is announced
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest_of(keep=Kept(images=KeptImages(every=2, format="png", size=(4, 4)))))
    told = draw_sheet(folder, sheet, count=5)
    assert (
        told
        == f"{sheet}: 5 pairs, images as the shards keep them: the model is not at 'teacher' (--model says where it is)"
    )
    across = 2 * TILE + GAP + MARGIN
    top = MARGIN + 3 * 24
    pixels = np.asarray(Image.open(sheet))[top, MARGIN + TILE + GAP :: across][:3, 0]
    assert pixels.tolist() == [0, 60, 120]  # of records 0, 6 and 12


def test_pairs_are_spread_over_the_shards_that_are_there(tmp_path):
    folder, manifest = make_couplings(tmp_path / "pairs", manifest_of()), manifest_of()

    def chosen(count: int, every: int) -> list[int]:
        return [record.indices[0] for record in spread_evenly(folder, manifest, count, every)]

    assert chosen(3, 1) == [0, 11, 22] and chosen(1, 1) == [0] and chosen(99, 1) == list(range(23))
    assert chosen(4, 5) == [0, 5, 15, 20]
    (record,) = spread_evenly(folder, manifest, 1, 1)
    assert record.noise.shape == (1, 2, 4, 4) and record.noise.base is None
    for name in ("00000.json", "00004.json"):
        (folder / "shards" / name).unlink()
    assert chosen(3, 1) == [5, 12, 19]
    for shard in set(range(5)) - set(shards_to_make(folder, manifest.plan)):
        (folder / "shards" / f"{shard:05d}.json").unlink()
    assert chosen(3, 1) == []


@pytest.mark.parametrize("name", ["no/such/folder.png", "sheet.xyz"])
def test_where_no_sheet_can_be_written_is_said_at_once(tmp_path, name):
    with pytest.raises(ConfigError):
        draw_sheet(tmp_path / "pairs", tmp_path / name, count=3)
