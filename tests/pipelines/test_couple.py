"""A couple stage shared by several commands: fixed shares, leases alone, one that is killed."""

import json
import shutil
import signal
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from instaflow.config import load_experiment
from instaflow.couplings.manifest import read_manifest
from instaflow.couplings.shards import read_shard, read_sidecar
from instaflow.errors import InstaFlowError, Interrupted
from instaflow.files import write_file, write_json
from instaflow.interruption import Stop
from instaflow.models.export import save_model
from instaflow.models.loading import load_model
from instaflow.models.settings import ModelSettings
from instaflow.rundir import locked, read_stats
from instaflow.world import ALONE, Worker
from pipelines.couple import repair
from pipelines.experiment import run_one
from tests.models.made import build_parts, teacher_scheduler
from tests.pipelines.conftest import TEXT
from tests.pipelines.runs import instaflow, start


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> dict[str, bytes]:
    """The shards as one command makes them."""
    run = tmp_path_factory.mktemp("alone")
    couple(config, run)
    return shards(run)


def couple(config: str, run: Path, worker: Worker = ALONE) -> None:
    run_one(load_experiment(config, (), str(run)), "pairs", Stop(), worker)


def shards(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "pairs" / "shards").iterdir()}


@pytest.mark.parametrize("count", [2, 3])
def test_workers_with_fixed_shares_make_what_one_makes(config, alone, tmp_path, capsys, count):
    for index in range(count):
        assert not (tmp_path / "pairs" / "done.json").exists()
        couple(config, tmp_path, Worker(index, count))
        made = {int(name[:5]) for name in shards(tmp_path)}
        assert made == {shard for shard in range(6) if shard % count <= index}
        assert ("other workers are not done yet" in capsys.readouterr().out) == (index < count - 1)
        state = json.loads((tmp_path / "pairs" / "state.json").read_text())["state"]
        assert state == ("done" if index == count - 1 else "unfinished")
    assert shards(tmp_path) == alone
    assert (tmp_path / "pairs" / "done.json").exists() and not (tmp_path / "pairs" / "leases").exists()


def test_a_worker_with_other_settings_is_refused(config, tmp_path):
    couple(config, tmp_path, Worker(0, 2))
    other = load_experiment(config, ("seed=1",), str(tmp_path))
    with pytest.raises(InstaFlowError, match="'seed' was 0, is now 1"):
        run_one(other, "pairs", Stop(), Worker(1, 2))


def test_a_worker_with_other_versions_is_told_so(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    couple(config, tmp_path, Worker(0, 3))
    couple(config, tmp_path, Worker(1, 3))
    assert "environment" not in capsys.readouterr().out
    file = tmp_path / "pairs" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["hardware"].keys() == {"name", "instaflow", "torch", "diffusers", "transformers"}
    del manifest["hardware"]["diffusers"]  # as in an older manifest
    write_json(file, manifest | {"hardware": manifest["hardware"] | {"torch": "2.0.1"}})
    couple(config, tmp_path, Worker(2, 3))
    said = f"pairs: 'node2' has torch {version('torch')}, not 2.0.1 as the first worker: shards may differ"
    assert said in capsys.readouterr().out and (tmp_path / "pairs" / "done.json").exists()


def test_who_comes_second_does_not_mark_it_done_again(config, tmp_path, monkeypatch, capsys):
    from pipelines import couple as module

    found = module.shards_fingerprint

    def another_was_first(folder, plan):
        write_file(folder / "done.json", json.dumps({"fingerprint": "theirs", "seconds": 1.0}))
        return found(folder, plan)

    monkeypatch.setattr(module, "shards_fingerprint", another_was_first)
    couple(config, tmp_path)
    assert json.loads((tmp_path / "pairs" / "done.json").read_text())["fingerprint"] == "theirs"
    assert "another worker was the first" in capsys.readouterr().out


def test_the_shards_of_other_workers_count_as_progress(config, tmp_path, monkeypatch):
    """Half of the stage is made by a first worker; the second begins where that one stopped, and ends at the whole."""
    from pipelines import couple as module

    couple(config, tmp_path, Worker(0, 2))
    told = []
    update = module.Progress.update
    monkeypatch.setattr(module.Progress, "update", lambda self, done: told.append(done) or update(self, done))
    make = module.make_records

    def another_makes_the_last(folder, shard, *rest, **keywords):
        records = make(folder, shard, *rest, **keywords)
        if shard == 1:
            couple(config, tmp_path, Worker(2, 3))
        return records

    monkeypatch.setattr(module, "make_records", another_makes_the_last)
    couple(config, tmp_path)
    assert told[0] == 0 and told[-1] == 20 and 8 + 4 + 4 in told


def test_repair_waits_for_no_worker_but_refuses_to_mix_with_one(config, alone, tmp_path):
    couple(config, tmp_path)
    tar = tmp_path / "pairs" / "shards" / "00003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with locked(tmp_path / "pairs", shared=True), pytest.raises(InstaFlowError, match="is being worked on"):
        repair(tmp_path / "pairs")
    done = tmp_path / "pairs" / "done.json"
    before = done.read_bytes()
    write_json(done, json.loads(before) | {"fingerprint": "of other bytes"})
    assert repair(tmp_path / "pairs") == [3]
    assert shards(tmp_path) == alone and json.loads(done.read_bytes()) == json.loads(before)
    assert not (tmp_path / "pairs" / "leases").exists()


def test_commands_that_share_a_stage_outlive_one_that_is_killed(config, alone, tmp_path):
    arguments = ("couple", config, "--run-dir", tmp_path)
    first = start(*arguments)
    while not list((tmp_path / "pairs").glob("leases/*.json")) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds a lease, and lives
    second = start(*arguments)
    while len(list((tmp_path / "pairs").glob("shards/*.json"))) < 5 and second.poll() is None:
        time.sleep(0.05)
    assert second.poll() is None  # it waits for the last shard
    first.send_signal(signal.SIGKILL)
    done = second.ended(timeout=300)
    assert done.returncode == 0 and "pairs: done in" in done.stdout
    assert shards(tmp_path) == alone
    assert "done before" in instaflow(*arguments).stdout


def test_a_shard_is_written_while_the_next_one_is_sampled(config, alone, tmp_path, monkeypatch):
    """Writing shard 2 waits here for the sampling of shard 3, and that of shard 4 waits for shard 2 to be written."""
    from pipelines import couple as module

    next_begun, written = threading.Event(), threading.Event()
    write, make = module.write_records, module.make_records

    def write_slowly(folder, shard, *rest):
        if shard == 2:
            assert next_begun.wait(60)
            time.sleep(0.5)
        sidecar = write(folder, shard, *rest)
        if shard == 2:
            written.set()
        return sidecar

    def make_and_tell(folder, shard, *rest, **keywords):
        if shard == 3:
            next_begun.set()
        assert shard != 4 or written.is_set()
        return make(folder, shard, *rest, **keywords)

    monkeypatch.setattr(module, "write_records", write_slowly)
    monkeypatch.setattr(module, "make_records", make_and_tell)
    couple(config, tmp_path)
    assert written.is_set() and shards(tmp_path) == alone


def latents(run: Path) -> np.ndarray:
    """All latents of a stage, by index."""
    plan = read_manifest(run / "pairs").plan
    parts = [read_shard(run / "pairs", read_sidecar(run / "pairs", shard, plan)) for shard in range(plan.num_shards)]
    return np.concatenate([part.latent for part in parts]).astype(np.float32)


def test_what_overflows_half_precision_is_sampled_once_more_in_float32(config, tmp_path):
    """A convolution whose values pass float16's largest, and which the next normalization brings back."""
    parts = build_parts()
    with torch.no_grad():
        for parameter in parts["unet"].down_blocks[0].resnets[0].conv1.parameters():
            parameter.mul_(2e5)
    save_model(tmp_path / "teacher", **parts, scheduler=teacher_scheduler(), settings=ModelSettings())
    text = TEXT.replace("MODEL", str(tmp_path / "teacher"))
    (tmp_path / "half.yaml").write_text(text.replace("num_steps", "dtype: float16, num_steps"))
    (tmp_path / "full.yaml").write_text(text)
    couple(str(tmp_path / "half.yaml"), tmp_path / "half")
    couple(str(tmp_path / "full.yaml"), tmp_path / "full")
    assert all(entry["left_out"] == 0 for entry in read_stats(tmp_path / "half" / "pairs" / "stats.jsonl"))
    half = load_model(tmp_path / "teacher", device=torch.device("cpu"), dtype=torch.float16)
    alone = half.sample(torch.randn(1, 4, 8, 8), ["a seven"], num_steps=2, guidance_scale=2.0)
    assert not alone.isfinite().all()
    np.testing.assert_allclose(latents(tmp_path / "half"), latents(tmp_path / "full"), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_network_makes_the_same_couplings_whoever_makes_them(config, alone, tmp_path):
    """In batches of three: the last one of a shard is smaller."""
    eager = load_experiment(config, ("stages.pairs.batch_size=3",), str(tmp_path))
    changes = ("stages.pairs.batch_size=3", "stages.pairs.compile=true")
    compiled = load_experiment(config, changes, str(tmp_path))
    with pytest.raises(Interrupted):
        run_one(compiled, "pairs", stop_after_a_shard(tmp_path))
    run_one(compiled, "pairs", Stop())
    assert read_manifest(tmp_path / "pairs").compiled
    made = shards(tmp_path)
    couple(config, tmp_path / "eager")
    np.testing.assert_allclose(latents(tmp_path), latents(tmp_path / "eager"), rtol=2e-3, atol=2e-3)
    (tmp_path / "pairs" / "shards" / "00005.tar").unlink()
    assert repair(tmp_path / "pairs") == [5] and shards(tmp_path) == made
    with pytest.raises(InstaFlowError, match="'compile' was True, is now absent"):
        run_one(eager, "pairs", Stop())


def stop_after_a_shard(run: Path) -> Stop:
    class Counted(Stop):
        def __call__(self) -> bool:
            if list((run / "pairs").glob("shards/*.json")):
                self.signal = "SIGTERM"
            return super().__call__()

    return Counted()
