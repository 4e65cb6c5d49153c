import os
import subprocess
import sys

import pytest

from instaflow.errors import InstaFlowError
from instaflow.world import Worker, World, as_the_leader_sees, barrier, worker, world


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in os.environ:
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "JOB_COMPLETION_INDEX") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def launched(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_a_launcher_is_alone():
    assert world() == World(rank=0, size=1, local_rank=0)
    assert world().leads


def test_the_launcher_says_which_process_this_is(monkeypatch):
    launched(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    assert world() == World(rank=5, size=8, local_rank=1)
    assert not world().leads


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "one"}, "must be whole numbers"),
        ({"RANK": ""}, "must be whole numbers"),
        ({"WORLD_SIZE": "2.0"}, "must be whole numbers"),
        ({"LOCAL_RANK": "x"}, "must be whole numbers"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_a_way_out(monkeypatch, variables, words):
    launched(monkeypatch, **variables)
    with pytest.raises(InstaFlowError) as caught:
        world()
    assert words in caught.value.message
    assert "torchrun" in caught.value.hint


def test_one_process_waits_for_nobody_and_loads_nothing():
    code = (
        "import sys; from instaflow.world import barrier, leave; barrier(); leave(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_barrier_alone_returns():
    barrier()
    assert as_the_leader_sees(True) is True
    assert as_the_leader_sees(False) is False


# --- workers --------------------------------------------------------------------------------------------------------

ARRAY = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "10", "SLURM_ARRAY_TASK_STEP": "2"}
ARRAY |= {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "8"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 5), (2, 5)),
        (ARRAY, (None, None), (2, 4)),
        (ARRAY, (0, 1), (0, 1)),  # options come first
        (ARRAY, (None, 6), (2, 6)),
        (SRUN, (None, None), (1, 3)),
        (ARRAY | SRUN, (None, None), (7, 12)),
        (ARRAY | SRUN | {"RANK": "5", "WORLD_SIZE": "8"}, (None, None), (2, 4)),  # torchrun's ranks share a worker's
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (None, None), (0, 1)),  # a batch script without srun
        ({"JOB_COMPLETION_INDEX": "3"}, (None, 4), (3, 4)),
        ({"JOB_COMPLETION_INDEX": "3"}, (None, None), (0, 1)),  # of how many is not told: leases alone
        ({"JOB_COMPLETION_INDEX": ""}, (None, None), (0, 1)),
    ],
)
def test_a_worker_is_what_the_options_say_or_the_scheduler(monkeypatch, variables, options, expected):
    launched(monkeypatch, **variables)
    assert worker(*options) == Worker(*expected)


def test_the_tasks_of_an_array_and_of_srun_are_all_different(monkeypatch):
    found = set()
    for task in range(4, 11, 2):
        for process in range(3):
            launched(monkeypatch, **ARRAY, **SRUN)
            launched(monkeypatch, SLURM_ARRAY_TASK_ID=str(task), SLURM_PROCID=str(process))
            found.add(worker().index)
    assert found == set(range(12))


@pytest.mark.parametrize(
    ("variables", "options", "words"),
    [
        ({}, (1, None), "--worker-index is given, but not --worker-count"),
        ({}, (None, 2), "--worker-count is given, but not --worker-index"),
        ({}, (2, 2), "index is 2, but their count is 2"),
        ({"JOB_COMPLETION_INDEX": "4"}, (None, 4), "index is 4, but their count is 4"),
        ({"JOB_COMPLETION_INDEX": "one"}, (None, 4), "JOB_COMPLETION_INDEX must be a whole number, not 'one'"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, (None, None), "array has 3 tasks between 4 and 10"),
    ],
)
def test_a_worker_that_cannot_be_is_refused_with_a_way_out(monkeypatch, variables, options, words):
    launched(monkeypatch, **variables)
    with pytest.raises(InstaFlowError) as caught:
        worker(*options)
    assert words in caught.value.message and caught.value.hint


@pytest.mark.parametrize("me", [Worker(), Worker(2, 5)])
def test_a_worker_s_options_mean_it_again(me):
    words = [int(word) for word in me.options()[1::2]]
    assert worker(*words) == me
