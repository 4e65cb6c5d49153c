"""A couple stage takes its prompts from any file, keeps its own copy, and goes on from that."""

import json

import pytest

from instaflow.config import load_experiment
from instaflow.couplings.loader import Couplings
from instaflow.couplings.verify import verify
from instaflow.errors import ConfigError, DataError
from instaflow.interruption import listening
from pipelines.couple import repair
from pipelines.experiment import run_all
from tests.models.made import write_model

ROWS = [("a seven", 1), ("", 3), ("the digit 7", 8), ("an odd, digit", 9), ("the digit 7", 9)]
STAGE = """
run: run
stages:
  pairs:
    {kind: couple, model: MODEL, count: 5, records_per_shard: 2, guidance_scale: 1.5, num_steps: 2,
     prompts: {path: p.jsonl, column: caption, score_column: score, min_score: 2, deduplicate: true}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def couple(model, tmp_path, monkeypatch):
    """Runs the stage; settings may be changed."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"caption": caption, "score": score}) for caption, score in ROWS]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    (tmp_path / "e.yaml").write_text(STAGE.replace("MODEL", str(model)))

    def run(*overrides: str) -> None:
        with listening() as stop:
            run_all(load_experiment("e.yaml", overrides), stop)

    return run


def test_shards_hold_the_prompts_that_were_taken_and_what_was_left_out_is_said_once(couple, tmp_path, capsys):
    couple()
    said = capsys.readouterr().out
    assert said.count("prompts taken") == 1
    assert "pairs: 2 of 5 prompts taken; left out: 1 with score below 2.0, 1 blank, 1 repeated\n" in said
    folder = tmp_path / "run" / "pairs"
    batch = Couplings(folder, seed=0).batch(0, 5)
    prompts = dict(zip(batch.indices.tolist(), batch.prompts, strict=True))
    assert [prompts[index] for index in range(5)] == ["the digit 7", "an odd, digit"] * 2 + ["the digit 7"]
    assert verify(folder) == []


def test_the_stage_s_own_copy_is_enough_to_repair_it(couple, tmp_path):
    couple()
    folder = tmp_path / "run" / "pairs"
    before = (folder / "shards" / "00001.tar").read_bytes()
    (folder / "shards" / "00001.tar").unlink()
    (tmp_path / "p.jsonl").unlink()
    assert repair(folder) == [1]
    assert (folder / "shards" / "00001.tar").read_bytes() == before


def test_other_prompts_are_refused_and_the_same_ones_in_another_form_are_not(couple, tmp_path):
    couple()
    with pytest.raises(ConfigError, match="'prompts' was '"):
        couple("stages.pairs.prompts.min_score=9")
    (tmp_path / "p.csv").write_text('text\nthe digit 7\n"an odd, digit"\n')
    couple("stages.pairs.prompts={path: p.csv, column: text}")


def test_a_changed_copy_is_refused_before_more_shards_are_made(couple, tmp_path):
    couple()
    folder = tmp_path / "run" / "pairs"
    (folder / "done.json").unlink()
    (folder / "shards" / "00002.json").unlink()
    (folder / "prompts.json").write_text('[\n"the digit 7",\n"an odd, digit!"\n]\n')
    with pytest.raises(DataError, match=r"prompts\.json.* does not have the hash"):
        couple()
    assert not (folder / "shards" / "00002.json").exists()
