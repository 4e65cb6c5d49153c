import os
import subprocess
import sys

import pytest

from instaflow.errors import InstaFlowError
from instaflow.world import (
    Worker,
    World,
    as_any_sees,
    as_the_leader_sees,
    barrier,
    first_node,
    join,
    together_under_srun,
    worker,
    world,
)
from tests.ports import free_port

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in os.environ:
        others = ("JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY")
        if name in LAUNCHERS or name in others or name.startswith("SLURM_"):
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
    assert (as_any_sees(True), as_any_sees(False)) == (True, False)


def test_what_one_process_of_several_sees_all_hear_of():
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    code = (
        "from instaflow.world import as_any_sees, leave, world\n"
        "print(as_any_sees(world().rank == 1), as_any_sees(False)); leave()"
    )
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=120)[0] for process in asked] == ["True False\n"] * 2


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
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "12"}, (None, None), "TASK_ID is 12, but the array's tasks are 4 to 10 by 2"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "7"}, (None, None), "TASK_ID is 7, but the array's tasks are 4 to 10 by 2"),
        (SRUN | {"SLURM_PROCID": "5"}, (None, None), "SLURM_PROCID is 5, but SLURM_STEP_NUM_TASKS is 3"),
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


# --- the tasks of srun as processes that work together --------------------------------------------------------------

# What Slurm 22.05 gave task 1 of `srun -N2 -n2`, as far as it is about tasks and nodes.
TASK = {
    "SLURM_JOB_ID": "8",
    "SLURM_JOB_NODELIST": "node[01-02]",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
BATCH = {name: value for name, value in TASK.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}


def told(monkeypatch, variables, names=LAUNCHERS):
    """What a launcher's variables say under these of Slurm's."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, **variables})
        together_under_srun()
        return {name: os.environ[name] for name in names if name in os.environ}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TASK, ("1", "2", "0", "node01", "28888")),
        (TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, ("0", "2", "0", "node01", "28888")),
        (TASK | {"SLURM_STEP_ID": "3"}, ("1", "2", "0", "node01", "28891")),  # two steps of a job at once
        (TASK | {"SLURM_JOB_ID": "4000000"}, ("1", "2", "0", "node01", "10000")),
        (TASK | {"SLURM_STEP_NODELIST": "here", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "1"},
         ("1", "2", "1", "127.0.0.1", "28888")),
        (TASK | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0"}, ("1", "2", "0", "node01", "28888")),
        (TASK | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("1", "2", "3", "node01", "28888")),
        (TASK | {"MASTER_ADDR": "ib-01", "MASTER_PORT": "29500"}, ("1", "2", "0", "ib-01", "29500")),
        (TASK | {"MASTER_ADDR": "ib-01", "SLURM_STEP_NODELIST": "gpu-[a,b]"}, ("1", "2", "0", "ib-01", "28888")),
        (TASK | {"RANK": "5", "WORLD_SIZE": "8"}, ("5", "8")),  # torchrun, started by srun
        (TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ()),
        (BATCH, ()),
        ({}, ()),
    ],
)  # fmt: skip
def test_srun_s_tasks_are_told_what_torchrun_would_tell(monkeypatch, variables, expected):
    assert tuple(told(monkeypatch, variables).values()) == expected


def test_steps_on_one_node_meet_at_ports_of_their_own(monkeypatch):
    """Of a hundred jobs in a row, each with a hundred steps."""
    ports = [
        told(monkeypatch, TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(7_000_000, 7_000_100)
        for step in range(100)
    ]
    assert len({*ports}) == len(ports) == 10_000
    assert all(10_000 <= int(port) < 30_000 for port in ports)


@pytest.mark.parametrize(("said", "waits"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_srun_s_tasks_leave_the_cores_to_one_another_while_they_wait(monkeypatch, said, waits):
    assert told(monkeypatch, TASK | said, ["OMP_WAIT_POLICY"]) == {"OMP_WAIT_POLICY": waits}
    assert told(monkeypatch, {}, ["OMP_WAIT_POLICY"]) == {}


def test_a_task_that_is_none_of_srun_s_is_refused(monkeypatch):
    with pytest.raises(InstaFlowError, match="SLURM_PROCID is 2, but SLURM_STEP_NUM_TASKS is 2"):
        told(monkeypatch, TASK | {"SLURM_PROCID": "2"})


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_tasks_that_cannot_find_each_other_are_refused_with_a_way_out(monkeypatch, missing):
    variables = {name: value for name, value in TASK.items() if name != missing}
    with pytest.raises(InstaFlowError, match=f"srun started 2 tasks, but.*{missing}.* is missing") as caught:
        told(monkeypatch, variables)
    assert "torchrun" in caught.value.hint


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_processes_that_know_no_first_one_are_refused_with_a_way_out(monkeypatch, missing):
    launched(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    monkeypatch.delenv(missing)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # by another test's training
    with pytest.raises(InstaFlowError, match=f"WORLD_SIZE is 2, but {missing}") as caught:
        join()
    assert "torchrun" in caught.value.hint


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node01", "node01"),
        ("node[01-03,7]", "node01"),
        ("node[7,9-11],login", "node7"),
        ("login,node[01-03]", "login"),
        ("rack[2-3]-node[08-10],x", "rack2-node08"),
        ("gpu-a100[004]", "gpu-a100004"),
        ("n[1-2].cluster.org,n7.cluster.org", "n1.cluster.org"),
    ],
)
def test_the_first_of_slurm_s_nodes(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["gpu-[a,b]", "node[x-z],login", ",node01", ""])
def test_a_node_list_that_does_not_tell_its_first_name_is_refused_with_a_way_out(nodes):
    with pytest.raises(InstaFlowError) as caught:
        first_node(nodes)
    assert f"first of '{nodes}'" in caught.value.message and "scontrol show hostnames" in caught.value.hint


def test_a_process_for_which_there_is_no_gpu_is_told_so(monkeypatch):
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # by another test, in this process
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InstaFlowError, match=r"process 2 on this machine, where PyTorch sees 1 GPU\n") as told:
        join()
    assert "no more processes than there are GPUs" in told.value.hint
