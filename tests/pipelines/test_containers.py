"""Stages in a container that sees its image and what is mounted, and nothing else of this machine.

apptainer and pyxis are stood in for: the same command lines start a mount namespace of its own. Its image is this
machine's Python and the libraries of its system.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.experiments import SMALL, write

STAGES = yaml.safe_load(SMALL)["stages"]
ROOM = """#!/bin/bash
# room MOUNTS FOLDER COMMAND: a root of its own, with the image's folders and the mounts SOURCE[:PLACE],...
set -e
root=$(mktemp -d "$0.XXXX")
mount -t tmpfs none "$root"
see() { mkdir -p "$root$2"; mount --rbind "$1" "$root$2"; }
for place in {image}; do see "$place" "$place"; done
mkdir -p "$root/tmp"
IFS=,
for place in $1; do see "${place%%:*}" "${place#*:}"; done
folder=$2
shift 2
exec chroot "$root" bash -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""
RUNTIME = """#!/bin/bash
# {0}, as far as a job calls it
for word; do
    case $word in
        --bind=*|--container-mounts=*) mounts=${{word#*=}} ;;
        --pwd=*|--container-workdir=*) folder=${{word#*=}} ;;
        --*|exec|{1}) ;;
        *) break ;;
    esac
    shift
done
exec unshare --mount --propagation private bash {2} "$mounts" "$folder" "$@"
"""


def can_unshare() -> bool:
    tried = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(tried, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs unshare, and the right to mount")


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An environment with the stand-ins, whose image is /images/it.sif, or it:latest of pyxis."""
    programs = tmp_path / "programs"
    programs.mkdir()
    image = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/dev", sys.prefix, sys.base_prefix]
    room = programs / "room"
    room.write_text(ROOM.replace("{image}", " ".join(place for place in image if Path(place).exists())))
    for name in ("apptainer", "srun"):
        (programs / name).write_text(RUNTIME.format(name, "/images/it.sif", room))
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}


def experiment(folder: Path, **cluster: object) -> list[str]:
    """What to type to submit a teacher, and pairs whose prompts lie outside of the run and of the current folder."""
    prompts = folder / "elsewhere" / "prompts.txt"
    prompts.parent.mkdir(exist_ok=True)
    prompts.write_text("a seven\nthe digit 7\n")
    stages = {"teacher": STAGES["teacher"], "pairs": {**STAGES["pairs"], "prompts": str(prompts)}}
    config = write(folder, yaml.safe_dump({"run": "runs/x", "cluster": cluster, "stages": stages}, sort_keys=False))
    return [sys.executable, "-m", "cli", "submit", config, "--run-dir", str(folder / "run")]


def test_a_stage_in_apptainer_sees_the_run_and_what_is_mounted_and_nothing_else(environment, tmp_path):
    cluster = {"container": "/images/it.sif", "gpus": 0}
    words = [*experiment(tmp_path, **cluster), "--backend", "local"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (tmp_path / "run" / "teacher" / "done.json").exists(), done.stderr
    assert f"{tmp_path}/elsewhere/prompts.txt" in done.stderr and "'pairs' failed" in done.stderr

    words += ["--set", f"cluster.mounts=[{tmp_path}/elsewhere]"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pairs" / "done.json").exists()


def test_a_stage_in_pyxis_s_container_runs_by_its_batch_script(environment, typed, tmp_path):
    code, out, err = typed(*experiment(tmp_path, container="it:latest", gpus=0)[3:], "--dry-run")
    assert code == 0, err
    script = out.split("# --- ")[1].partition("\n")[2]
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    kept = {"run": str(tmp_path / "run"), "stages": {"teacher": STAGES["teacher"]}}
    (tmp_path / "run" / "jobs" / "experiment.yaml").write_text(yaml.safe_dump(kept))
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Job 7 ends with exit code 0" in done.stdout
    assert (tmp_path / "run" / "teacher" / "done.json").exists()
