"""A couple stage whose shards go to a store."""

import json
from pathlib import Path

import pytest

from instaflow import stores
from instaflow.config import Experiment, load_experiment
from instaflow.errors import InstaFlowError
from instaflow.interruption import Stop
from instaflow.world import Worker
from pipelines.couple import repair
from pipelines.experiment import run_all, run_one
from tests.pipelines.runs import instaflow


@pytest.fixture(scope="module")
def local(config, tmp_path_factory) -> Path:
    """The stage's folder without an output."""
    run = tmp_path_factory.mktemp("local")
    run_one(load_experiment(config, (), str(run)), "pairs", Stop())
    return run / "pairs"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def mark(stage: Path) -> str:
    return str(json.loads((stage / "done.json").read_text())["fingerprint"])


def with_output(config: str, run: Path, url: str, *overrides: str) -> Experiment:
    return load_experiment(config, (f"stages.pairs.output={url}", *overrides), str(run))


def test_workers_with_one_store_and_no_shared_folder_make_what_one_makes(config, local, tmp_path):
    url, runs = f"file://{tmp_path}/store", [tmp_path / "first", tmp_path / "last"]
    for index, run in enumerate(runs):
        run_one(with_output(config, run, url), "pairs", Stop(), Worker(index, 2))
        assert (run / "pairs" / "done.json").exists() == (index == 1)
    run_one(with_output(config, runs[0], url), "pairs", Stop())  # the same command again finds all made
    expected = files(local / "shards")
    assert files(tmp_path / "store" / "shards") == expected
    for run in runs:
        assert files(run / "pairs" / "shards") == {name: expected[name] for name in expected if ".json" in name}
        assert mark(run / "pairs") == mark(local)


def test_repair_makes_a_bad_shard_of_a_store_again(config, local, tmp_path):
    store = tmp_path / "store"
    run_one(with_output(config, tmp_path, f"file://{store}"), "pairs", Stop())
    tar = store / "shards" / "00003.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    said = instaflow("verify", tmp_path / "pairs", expect=1).stderr
    assert f'"file://{tar}" does not have the hash' in said and "Hint: instaflow repair" in said
    assert repair(tmp_path / "pairs") == [3]
    assert files(store / "shards") == files(local / "shards")
    assert instaflow("verify", tmp_path / "pairs").stdout.endswith("6 shards, 44 couplings, all sound\n")


def test_a_store_that_is_gone_costs_no_shard(config, local, tmp_path):
    """As one that is not mounted: repair touches nothing, and all is there again when the store is."""
    store, away = tmp_path / "store", tmp_path / "away"
    run_one(with_output(config, tmp_path, f"file://{store}"), "pairs", Stop())
    before = files(tmp_path / "pairs" / "shards")
    store.rename(away)
    with pytest.raises(InstaFlowError, match="has lost the shards") as caught:
        repair(tmp_path / "pairs")
    assert "mounted" in caught.value.hint and files(tmp_path / "pairs" / "shards") == before
    away.rename(store)
    assert repair(tmp_path / "pairs") == []


def test_an_output_may_change_until_there_are_shards_and_is_reached_before_any_stage(config, tmp_path, monkeypatch):
    one, other = (f"file://{tmp_path}/{name}" for name in ("one", "other"))
    run_one(with_output(config, tmp_path, one), "pairs", Stop(), Worker(0, 2))
    with pytest.raises(InstaFlowError, match=f"lie in '{one}'; `output` is now {other}"):
        run_one(with_output(config, tmp_path, other), "pairs", Stop())
    monkeypatch.setattr(stores, "PAUSES", ())
    with pytest.raises(InstaFlowError, match=r"could not be read: .*Connection refused"):
        run_all(with_output(config, tmp_path / "new", "ftp://127.0.0.1:1/pairs"), Stop())
    assert not (tmp_path / "new").exists()
    run_one(with_output(config, tmp_path, one), "pairs", Stop())
    with pytest.raises(InstaFlowError, match="holds other couplings: 'seed' is 0 there, 1 here"):
        run_one(with_output(config, tmp_path / "new", one, "seed=1"), "pairs", Stop())
