"""A Slurm of two nodes on this machine: munged, one slurmctld and two slurmd, in a folder of their own."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("taskset", "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
NODES = ("node1", "node2")
CONF = """
ClusterName=two
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
MessageTimeout=60
TCPTimeout=60
BatchStartTimeout=300
SlurmdTimeout=0
KillWait=20
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=3
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=3
PartitionName=both Nodes=node1,node2 Default=YES
"""
"""A requeued job waits until its credentials have expired: twenty seconds here, two minutes by default. With
less a busy machine does not launch a job in time. For its sake, too, no other wait is short, and no node is given up
but by `lose_node`."""
MADE = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
MADE |= {"log-file": "munge.log", "seed-file": "munge.seed"}


class Slurm:
    """The running cluster; its commands, as a user types them, want `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def type(self, *words: str) -> str:
        """What a command of Slurm's prints. Fails with its errors."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=300)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        """The nodes' states."""
        return self.type("sinfo", "--Node", "--noheader", "--format=%T").split()

    def empty(self) -> None:
        """Cancel every job, and wait until all have ended."""
        self.type("scancel", "--me")
        wait_until(lambda: not self.type("squeue", "--noheader").strip(), self)

    def start(self, name: str, *words: str, core: int | None = None) -> None:
        """Start a daemon, on one core alone if it is said which: so are then all that it starts."""
        program = find(words[0])
        assert program
        on_core = ["taskset", "--cpu-list", str(core)] if core is not None else []
        with open(self.folder / "daemons.log", "ab") as log:
            command = [*on_core, program, *words[1:]]
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def start_node(self, node: str) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.start(node, "slurmd", "-D", "-N", node, core=cores[NODES.index(node) % len(cores)])

    def lose_node(self, node: str) -> None:
        """Kill all that runs on a node, and let the controller know at once, where it would wait for minutes."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        send(signal.SIGSTOP, processes(SLURMD_NODENAME=node))  # else they end, or tell of it, meanwhile
        self.type("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        send(signal.SIGKILL, processes(SLURMD_NODENAME=node))

    def freeze(self, job: str) -> None:
        """Stop the clock for a job's tasks, until Slurm signals them: with any signal it sends SIGCONT."""
        send(signal.SIGSTOP, processes(SLURM_JOB_ID=job, SLURM_STEP_ID="0"))

    def job(self, number: str) -> dict[str, str]:
        """All that is told of a job, or of one of an array's."""
        fields = self.type("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.partition("=")[::2] for field in fields)

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))


def processes(**variables: str) -> list[int]:
    """Those that were started with these variables in their environment."""
    wanted, found = {f"{name}={value}".encode() for name, value in variables.items()}, []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it may have ended, or be another user's
            if wanted <= {*environment.read_bytes().split(b"\0")}:
                found.append(int(environment.parent.name))
    return found


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def missing() -> str | None:
    """Why there can be no Slurm here."""
    absent = [program for program in PROGRAMS if not find(program)]
    return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextmanager
def started(folder: Path) -> Iterator[Slurm]:
    """The cluster as long as the block runs; all that it started has ended afterwards."""
    folder.mkdir(mode=0o755)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / node).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf = CONF.format(
        host=socket.gethostname(),
        ports=[free_port() for _ in range(3)],
        first_job=random.randrange(1, 1_000_000),  # the tasks' port follows from it, and this machine may have others
        user=pwd.getpwuid(os.getuid()).pw_name,
        folder=folder,
    )
    (folder / "slurm.conf").write_text(conf)
    slurm = Slurm(folder)
    munge = [f"--{option}={folder / file}" for option, file in MADE.items()]
    try:
        # `--force`: pytest's folders are nobody else's, and this socket need not be
        slurm.start("munged", "munged", "--foreground", "--force", "--num-threads=2", *munge)
        wait_until(lambda: (folder / "munge.socket").exists(), slurm)
        slurm.start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            slurm.start_node(node)
        wait_until(lambda: slurm.states() == ["idle", "idle"], slurm)
        yield slurm
    finally:
        try:
            if "slurmctld" in slurm.daemons:
                slurm.empty()
        finally:
            for daemon in reversed(slurm.daemons.values()):
                daemon.terminate()
            for daemon in slurm.daemons.values():
                try:
                    daemon.wait(60)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def wait_until(ready: Callable[[], bool], slurm: Slurm, seconds: float = 300, pause: float = 0.3) -> None:
    """Wait until `ready()`, for which a command of Slurm's may fail as well. Fails with the logs."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except AssertionError:
            pass
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(pause)
