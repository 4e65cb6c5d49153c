import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch

from instaflow import meeting
from instaflow.errors import InstaFlowError
from instaflow.meeting import Facts, check_alike, check_folder, check_launch, differences, interfaces, missing_gpu, sees
from tests.experiments import write
from tests.pipelines.runs import ROOT

GIVEN = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True)
def given(monkeypatch):
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


MEETINGS = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
from instaflow import meeting, world
from instaflow.errors import InstaFlowError
rank, ports, folder = world.world().rank, sys.argv[1].split(","), Path(sys.argv[2])

def meet(run="run", seconds=60):
    os.environ["MASTER_PORT"] = ports.pop(0)
    meeting.PATIENCE = timedelta(seconds=seconds)
    try:
        meeting.check_launch(folder / run)
        said = ["", ""]
    except InstaFlowError as error:
        said = [error.message, error.hint]
    print(json.dumps(said), flush=True)

mine = meeting.__version__
meeting.__version__ = "0.0.7" if rank else mine
meet()
meeting.__version__ = mine
os.environ |= {"GLOO_SOCKET_IFNAME": "nope"} if rank else {}
meet(seconds=5)
os.environ.pop("GLOO_SOCKET_IFNAME", None)
ports[0] = "9" if rank else ports[0]
meet(seconds=5)
meeting.SEEN_WITHIN = 1
meet(run="elsewhere" if rank else "run")
ports.append("unused")
meet()
print(json.dumps(world.gather(f"of {rank}")))
world.leave()
"""


@pytest.mark.slow
def test_two_processes_are_told_what_keeps_them_from_working_together(tmp_path):
    """Five meetings: with other versions, a wrong interface, a wrong address, another folder, and a good one."""
    words = [sys.executable, "-c", MEETINGS, ",".join(free_ports(4)), str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables | {"RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
        )
        for rank in (0, 1)
    ]
    said = [[json.loads(line) for line in process.communicate(timeout=240)[0].splitlines()] for process in processes]
    versions, interface, address, folder, good, gathered = zip(*said, strict=True)
    for message, _ in versions:
        assert message == (
            f"The processes of this launch differ: instaflow is {meeting.__version__} on 'node0', 0.0.7 on 'node1'"
        )
    for rank, (message, hint) in enumerate(interface):
        assert message.startswith(f"Process {rank} of 2, on 'node{rank}', does not reach the others")
        assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in hint and f"'node{rank}' has lo (127.0.0.1)" in hint
    assert interface[1][0].endswith("Unable to find address for: nope")
    assert interface[1][1].endswith("; GLOO_SOCKET_IFNAME is nope")
    assert "1/2 clients joined" in address[0][0] and "is to be at 127.0.0.1:9: " in address[1][0]
    for message, hint in folder:
        assert message == (
            f"What 'node0' writes into '{tmp_path}/run' is not seen by 'node1' at '{tmp_path}/elsewhere'"
        )
        assert "a file system that all nodes share" in hint
    assert good == (["", ""], ["", ""]) and gathered == (["of 0", "of 1"],) * 2
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_first_process_whose_name_leads_nowhere_is_told_at_once(monkeypatch, rank):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=20))
    began = time.monotonic()
    with pytest.raises(
        InstaFlowError, match=f"Process {rank} of 2, .* is to be at no.such.host.invalid:29500: "
    ) as told:
        meeting.Meeting(rank, 2)
    assert isinstance(told.value.__cause__, socket.gaierror) and "MASTER_ADDR is the first" in told.value.hint
    assert time.monotonic() - began < 15


def test_a_first_process_that_does_not_listen_is_waited_for_as_long_as_is_said(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_ports(1)[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=4))
    began = time.monotonic()
    with pytest.raises(InstaFlowError, match="Process 1 of 2"):
        meeting.Meeting(1, 2)
    assert 3 < time.monotonic() - began < 7


@without_gpu
@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES is 0, but "),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "2"}, "CUDA_VISIBLE_DEVICES is 2,3, but "),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE is 8, but "),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_SIZE": "2"}, None),  # DeepSpeed's launcher says so anywhere
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "8"}, None),  # chosen so by hand
    ],
)
def test_a_job_with_gpus_that_sees_none_is_told(monkeypatch, variables, begins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wrong = missing_gpu()
    assert (wrong is None) == (begins is None)
    assert wrong is None or (wrong[0].startswith(begins) and "the CPU, set CUDA_VISIBLE_DEVICES to nothing" in wrong[1])


@without_gpu
def test_a_stage_on_a_job_without_its_gpus_does_not_start(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    code, _, err = typed("teacher", write(tmp_path), "--run-dir", tmp_path / "run")
    assert code == 1 and err.startswith("Error: SLURM_GPUS_ON_NODE is 1, but ")
    assert not (tmp_path / "run").exists()


def test_a_process_alone_asks_nobody(tmp_path):
    check_launch(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def facts(host: str, device: str = "a GPU", **versions: str) -> Facts:
    return Facts(host, device, None, versions)


def test_processes_that_run_the_same_are_alike():
    check_alike([facts("a", torch="2"), facts("a", torch="2"), facts("b", torch="2")])


def test_what_differs_is_told_with_the_nodes():
    told = [
        facts("a", torch="2", diffusers="1"),
        facts("a", torch="2", diffusers="1"),
        facts("b", "the CPU", torch="3"),
    ]
    told += [facts(name, torch="3", diffusers="1") for name in ("c", "d")]
    with pytest.raises(InstaFlowError) as caught:
        check_alike(told)
    assert caught.value.message == (
        "The processes of this launch differ: torch is 2 on 'a', 3 on 'b' and 'c' and 1 more; "
        "diffusers is 1 on 'a' and 'c' and 1 more, missing on 'b'; the device is a GPU on 'a' and 'c' and 1 more, the "
        "CPU on 'b'"
    )
    assert differences([("a", {"torch": "2"})]) == []


def test_a_process_without_its_gpu_is_told_with_its_node():
    with pytest.raises(InstaFlowError, match="On 'b' nothing there") as caught:
        check_alike([facts("a"), Facts("b", "the CPU", ("nothing there", "look"))])
    assert caught.value.hint == "look"


def test_a_file_that_is_seen_late_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "SEEN_WITHIN", 0.0)
    assert not sees(tmp_path / "late")
    monkeypatch.setattr(meeting, "SEEN_WITHIN", 60.0)
    timer = threading.Timer(0.5, (tmp_path / "late").touch)
    timer.start()
    assert sees(tmp_path / "late")
    timer.join()


def test_a_folder_that_cannot_be_written_is_told_to_all(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InstaFlowError, match=f"The first process cannot write into '{tmp_path}/file'"):
        check_folder(tmp_path / "file", lambda value: [value, value], leads=True)


def test_this_machine_has_a_loop_of_its_own():
    assert interfaces()["lo"] == "127.0.0.1"
