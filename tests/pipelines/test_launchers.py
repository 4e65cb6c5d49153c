"""Training by the real command under launchers other than torchrun, and on a shard that holds what is no number."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from instaflow.config import load_experiment
from instaflow.couplings.loader import Couplings
from instaflow.couplings.shards import sidecar_path, tar_path
from instaflow.couplings.verify import verify
from instaflow.files import sha256_of, write_json
from instaflow.interruption import Stop
from pipelines.experiment import run_one
from tests.models.made import write_model
from tests.pipelines.conftest import TEXT
from tests.pipelines.runs import command, environment, instaflow
from tests.ports import free_port
from tests.test_world import TASK

pytestmark = pytest.mark.slow
REFLOW = """
  2rf:
    {kind: reflow, init: MODEL, couplings: pairs, checkpoint_every: 8,
     phases: [{samples: 32, global_batch_size: 8, learning_rate: 1e-3}]}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "small.yaml"
    path.write_text((TEXT + REFLOW).replace("MODEL", str(write_model(folder / "teacher"))))
    return str(path)


@pytest.fixture(scope="module")
def coupled(config, tmp_path_factory) -> Path:
    """A run whose couplings are made."""
    run = tmp_path_factory.mktemp("coupled") / "run"
    run_one(load_experiment(config, (), str(run)), "pairs", Stop())
    return run


def copy(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def weights(run: Path) -> list[str]:
    assert (run / "2rf" / "done.json").exists()
    return [
        sha256_of(run / "2rf" / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("model", "model-raw")
    ]


def test_srun_and_the_deepspeed_launcher_train_the_same(config, coupled, tmp_path):
    """As two processes each: two that were alone would want the same stage's lock, and one be refused."""
    by_deepspeed = copy(coupled, tmp_path / "deepspeed")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    words = ["--module", "cli", "reflow", config, "--run-dir", str(by_deepspeed)]
    variables = environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'--local_rank=1'" in done.stdout + done.stderr

    by_srun = copy(coupled, tmp_path / "srun")
    here = TASK | {"SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(
            command("reflow", config, "--run-dir", by_srun),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment() | here | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in (0, 1)
    ]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2rf: done" in said[0] and "2rf:" not in said[1]  # one speaks for both
    assert weights(by_srun) == weights(by_deepspeed)


def spoil(pairs: Path, index: int) -> None:
    """Put one NaN into a record's latent, and the tar's new hash into its sidecar."""
    shard = index // 8
    old, new = tar_path(pairs, shard).read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(old)) as source, tarfile.open(fileobj=new, mode="w") as target:
        latents = [member.name for member in source if member.name.endswith(".latent.npy")]
        for member in source:
            data = source.extractfile(member).read()
            if member.name == latents[index % 8]:
                latent = np.load(io.BytesIO(data))
                latent[0, 0, 0] = np.nan
                np.save(changed := io.BytesIO(), latent)
                data = changed.getvalue()
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    tar_path(pairs, shard).write_bytes(new.getvalue())
    sidecar = json.loads(sidecar_path(pairs, shard).read_text())
    write_json(sidecar_path(pairs, shard), sidecar | {"sha256": sha256(new.getvalue()).hexdigest()})


def test_a_nan_in_a_shard_stops_the_run_at_its_batch_and_is_never_saved(config, coupled, tmp_path):
    run = copy(coupled, tmp_path)
    index = int(Couplings(run / "pairs", 0).batch(16, 8).indices[3])  # of the third batch
    spoil(run / "pairs", index)
    checkpoints = run / "2rf" / "checkpoints"
    stopped = instaflow("reflow", config, "--run-dir", run, expect=1)
    (error,) = [line for line in stopped.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: Stage '2rf': the loss is nan at 16 samples, on records of shards ")
    assert f"{index // 8:05d}" in error.partition("shards ")[2].partition(" of 'pairs'")[0].split(", ")
    assert error.endswith(f"the last good checkpoint is '{checkpoints / f'{16:012d}'}'")
    assert "`instaflow verify` checks the data" in stopped.stderr and "Traceback" not in stopped.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"{8:012d}", f"{16:012d}"]
    assert not (run / "2rf" / "model").exists() and not (run / "2rf" / "done.json").exists()
    assert {problem.shard for problem in verify(run / "pairs")} == {index // 8}
