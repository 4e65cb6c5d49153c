"""What docs/ has for other clusters, a Kubernetes Job and a Ray job: their commands make one machine's shards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipelines.runs import ROOT, environment

JOB = ROOT / "docs" / "kubernetes-couple.yaml"
RAY = ROOT / "docs" / "ray_couple.py"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The manifest."""
    return yaml.safe_load(JOB.read_text())


@pytest.fixture
def config(config, tmp_path) -> Path:
    """The small couple stage, its run beside its file."""
    path = tmp_path / "mine.yaml"
    path.write_text(Path(config).read_text().replace("run: unused", f"run: {tmp_path}/run"))
    return path


def hashes(run: Path) -> list[str]:
    return [json.loads(file.read_text())["sha256"] for file in sorted((run / "pairs" / "shards").glob("*.json"))]


def words_of(job: dict[str, Any]) -> list[str]:
    """The container's command."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container["command"]


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_job_is_what_the_api_takes(job, version):
    validating = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validating.validate(job, version, strict=True)


def test_the_job_s_parts_fit_together(job):
    """What no schema tells."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = words_of(job)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    assert words[words.index("--worker-count") + 1] == str(spec["completions"])
    assert pod["restartPolicy"] == "Never"  # a failure policy is refused otherwise
    rules = spec["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    assert [rule["action"] for rule in rules if 75 in rule.get("onExitCodes", {}).get("values", [])] == ["Ignore"]
    assert all(("onExitCodes" in rule) != ("onPodConditions" in rule) for rule in rules)
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_the_job_s_pods_make_the_shards_of_one_machine(job, config, typed, tmp_path, monkeypatch):
    local = tmp_path / "local"
    assert typed("couple", config, "--run-dir", local)[0] == 0
    words = [str(config) if word == "mine.yaml" else word for word in words_of(job)]
    count = job["spec"]["completions"]
    for index in range(count):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        assert typed(*words[1:])[0] == 0
        assert len(hashes(tmp_path / "run")) == min(index + 1, 6)  # of six shards, one each
        assert (tmp_path / "run" / "pairs" / "done.json").exists() == (index >= 5)
    assert hashes(tmp_path / "run") == hashes(local)


@pytest.mark.slow
def test_ray_s_tasks_make_the_shards_of_one_machine(config, typed, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    local = tmp_path / "local"
    assert typed("couple", config, "--run-dir", local)[0] == 0
    variables = environment() | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    done = subprocess.run(
        [sys.executable, str(RAY), str(config), "pairs", "2", "0"], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(tmp_path / "run") == hashes(local)
    assert (tmp_path / "run" / "pairs" / "done.json").exists()
