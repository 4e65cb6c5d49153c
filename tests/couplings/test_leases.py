"""Any number of workers, killed at any moment, make the same shards; a lease saves work and decides nothing."""

import json
import os
import random
import shutil
import signal
import time
from itertools import count as numbers

import pytest

from instaflow.couplings import leases
from instaflow.couplings.leases import Leases, holder_of, lease
from instaflow.couplings.shards import sidecar_path
from instaflow.couplings.verify import verify
from instaflow.errors import DataError
from instaflow.files import write_file
from instaflow.processes import this_process
from tests.couplings.made import contents, make_couplings, manifest_of
from tests.couplings.workers import open_stage, records, start, work, work_until


@pytest.fixture
def stage(tmp_path):
    return open_stage(tmp_path / "pairs", manifest_of())


@pytest.fixture
def quick(monkeypatch):
    """Leases whose times are short enough to wait for."""
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    monkeypatch.setattr(leases, "STALE", 0.3)
    monkeypatch.setattr(leases, "POLL", 0.01)


def put_lease(stage, shard: int, **changes) -> bytes:
    content = json.dumps({**lease(), **changes}).encode()
    (stage / "leases").mkdir(exist_ok=True)
    write_file(stage / "leases" / f"{shard:05d}.json", content)
    return content


def never() -> bool:
    return False


# --- one worker -------------------------------------------------------------------------------------------------------


def test_a_worker_makes_each_shard_once_and_leaves_no_lease(stage):
    assert work(stage, manifest_of()) == [0, 1, 2, 3, 4]
    assert work(stage, manifest_of()) == []
    assert list((stage / "leases").iterdir()) == []


def test_a_lease_tells_its_holder_while_the_shard_is_made(stage):
    with Leases(stage) as held:
        next(held.turns([3], never))
        fields = json.loads((stage / "leases" / "00003.json").read_text())
        assert (fields["pid"], fields["host"]) == (os.getpid(), os.uname().nodename)
        assert abs(fields["heartbeat"] - time.time()) < 60


def test_a_lease_is_renewed_while_it_is_held_and_given_back_after_an_error(stage, quick):
    path = stage / "leases" / "00000.json"
    with pytest.raises(RuntimeError), Leases(stage) as held:
        next(held.turns([0], never))
        first, deadline = path.read_bytes(), time.monotonic() + 30
        while path.read_bytes() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.read_bytes() != first and holder_of(path.read_bytes()) == holder_of(first)
        raise RuntimeError
    assert not path.exists()


def test_a_shard_that_is_still_being_written_is_neither_taken_again_nor_waited_for(stage):
    """Its lease is held, and renewed, while further shards are taken."""
    with Leases(stage) as held:
        turns = held.turns([0, 1, 2], never)
        assert [shard for shard, _ in turns] == [0, 1, 2]
        assert len(list((stage / "leases").iterdir())) == 3
        held.give_back(1)
        assert sorted(path.stem for path in (stage / "leases").iterdir()) == ["00000", "00002"]
    assert list((stage / "leases").iterdir()) == []


def test_a_shard_that_was_abandoned_is_taken_again(stage):
    asked = []
    with Leases(stage) as held:
        for shard, _ in held.turns([0, 1], lambda: len(asked) > 2):
            asked.append(shard)
            held.give_back(shard)
    assert asked == [0, 1, 0]


def test_a_stop_ends_the_turns_and_gives_the_lease_back(stage):
    asked = iter([False, True])
    with Leases(stage) as held:
        assert len([shard for shard, _ in held.turns([0, 1, 2], lambda: next(asked))]) == 1
    assert list((stage / "leases").iterdir()) == []


def test_a_shard_that_is_done_by_the_time_its_lease_is_free_is_not_made_again(stage, monkeypatch):
    make_couplings(stage, manifest_of())
    answers = iter([False, True, True])  # not made; made once the lease is taken
    monkeypatch.setattr(Leases, "_is_made", lambda self, shard: next(answers))
    assert list(Leases(stage).turns([0], never)) == []


def test_a_bad_shard_is_unmarked_when_its_turn_has_come(stage):
    make_couplings(stage, manifest_of())
    with Leases(stage) as held:
        turns = held.turns([1, 3], never, lambda shard: sidecar_path(stage, shard).unlink())
        assert next(turns)[0] == 1
        assert [sidecar_path(stage, shard).exists() for shard in range(5)] == [True, False, True, True, True]
        assert next(turns)[0] == 3


def test_a_lease_of_one_s_own_that_was_left_is_taken_up(stage):
    put_lease(stage, 0)
    assert Leases(stage)._take(0)


def test_clearing_removes_every_lease_and_what_killed_workers_left(stage):
    put_lease(stage, 1, host="elsewhere")
    killed, lives = this_process(), f"elsewhere-{this_process().namespace}-7"
    (stage / "shards").mkdir()
    for writer in (f"{killed.host}-{killed.namespace}-4194305", lives):  # the first number is beyond the highest
        (stage / "shards" / f".00003.tar.tmp-{writer}").touch()
    Leases(stage).clear()
    assert not (stage / "leases").exists()
    assert [path.name for path in (stage / "shards").iterdir()] == [f".00003.tar.tmp-{lives}"]
    Leases(stage).clear()


# --- who is dead ------------------------------------------------------------------------------------------------------


def test_a_live_worker_s_shard_is_left_to_it(stage, quick, caplog):
    me = os.getpid()
    put_lease(stage, 0, pid=os.getppid(), started=0)  # lives
    asked = numbers()
    with Leases(stage) as held:
        taken = [shard for shard, _lost in held.turns([0, 1], lambda: next(asked) > 6)]
    assert taken == [1] and me != os.getppid()
    assert "waiting for other workers" in caplog.text


@pytest.mark.parametrize("end", ["killed", "another took its number", "not reaped"])
def test_a_dead_worker_of_this_host_is_known_at_once(stage, end):
    process = start(time.sleep, 600)
    fields = {"pid": process.pid, "started": 0 if end != "another took its number" else 1}
    put_lease(stage, 0, **fields)
    assert not Leases(stage)._take(0) or end == "another took its number"
    if end != "another took its number":
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        if end == "killed":
            process.join()
        assert Leases(stage)._take(0)
    assert holder_of((stage / "leases" / "00000.json").read_bytes()).pid == os.getpid()
    process.kill()
    process.join()


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"namespace": 1}], ids=["host", "container"])
def test_another_host_s_worker_is_dead_when_its_heartbeat_stays_away(stage, quick, changes):
    """Whatever its clock says, and though a process with its number may live here or not."""
    put_lease(stage, 0, **changes, pid=2**22 + 1, heartbeat=0.0)
    here = Leases(stage)
    for beat in range(5):  # it lives: the clock is far off, but its heartbeat moves
        put_lease(stage, 0, **changes, pid=2**22 + 1, heartbeat=float(beat))
        assert not here._take(0)
        time.sleep(0.1)
    deadline = time.monotonic() + 30
    began = time.monotonic()
    while not here._take(0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 0.1 < time.monotonic() - began < 30
    assert holder_of((stage / "leases" / "00000.json").read_bytes()).pid == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "a"}', b"\xff"])
def test_a_damaged_lease_is_waited_for_and_then_taken(stage, quick, content):
    (stage / "leases").mkdir()
    (stage / "leases" / "00000.json").write_bytes(content)
    here = Leases(stage)
    assert not here._take(0)
    time.sleep(0.4)
    assert here._take(0)


def test_a_lease_that_another_took_over_is_lost_and_stays_the_other_s(stage, quick):
    held = Leases(stage)
    _, lost = next(held.turns([0], never))
    assert not lost()
    theirs = put_lease(stage, 0, host="elsewhere")
    deadline = time.monotonic() + 30
    while not lost() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lost()
    held.give_back(0)
    assert (stage / "leases" / "00000.json").read_bytes() == theirs


def test_of_many_workers_that_ask_for_one_shard_one_gets_it(stage, tmp_path):
    def ask(number: int) -> None:
        while not (tmp_path / "go").exists():
            pass
        if Leases(stage)._take(0):
            (tmp_path / f"got-{number}").touch()
        time.sleep(600)  # its lease lives

    workers = [start(ask, number) for number in range(6)]
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("got-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    for worker in workers:
        worker.kill()
        worker.join()
    assert len(list(tmp_path.glob("got-*"))) == 1


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_gone_is_a_clear_error(stage):
    shutil.rmtree(stage)
    with pytest.raises(DataError, match=r'00000\.json" could not be written: No such file or directory'):
        work(stage, manifest_of())
    assert not stage.exists()


def test_a_heartbeat_that_cannot_be_written_stops_no_work(stage, quick, monkeypatch):
    with Leases(stage) as held:
        _, lost = next(held.turns([0], never))
        monkeypatch.setattr(leases, "write_file", lambda path, data: (_ for _ in ()).throw(OSError(28, "full")))
        time.sleep(0.2)
        assert not lost()


# --- the same bytes, whoever made them and whatever died --------------------------------------------------------------


def test_killed_before_any_call_that_writes_and_taken_over_gives_the_same_bytes(tmp_path):
    manifest = manifest_of(count=2)
    expected = contents(make_couplings(tmp_path / "expected", manifest))
    for call in numbers(1):
        folder = open_stage(tmp_path / str(call), manifest)
        process = start(work_until, call, folder, manifest)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for name, data in contents(folder).items():  # complete or absent, but for temporary files and leases
            assert ".tmp-" in name or name.startswith("leases/") or data == expected[name], (name, call)
        work(folder, manifest)  # at once: no heartbeat of a dead process is waited for
        Leases(folder).clear()
        assert contents(folder) == expected, f"after {call - 1} calls"
        shutil.rmtree(folder)
    assert call > 40


@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_workers_killed_anywhere_make_the_same_records(tmp_path, seed):
    """Drawn: count, records a shard, world size, fixed shares or leases alone, and where each worker is killed."""
    draw = random.Random(seed)
    manifest = manifest_of(count=draw.randint(1, 60), records_per_shard=draw.randint(1, 12))
    expected = make_couplings(tmp_path / "expected", manifest)
    folder = open_stage(tmp_path / "pairs", manifest)
    size = draw.choice([1, 2, 3])
    for _round in range(draw.randint(0, 3)):
        workers = [start(work_until, draw.randint(1, 150), folder, manifest) for _ in range(size)]
        for worker in workers:
            worker.join(120)
            assert worker.exitcode in (0, -signal.SIGKILL)
    fixed = draw.random() < 0.5
    last = [start(work, folder, manifest, *((index, size) if fixed else ())) for index in range(size)]
    for worker in last:
        worker.join(120)
        assert worker.exitcode == 0
    Leases(folder).clear()
    assert contents(folder) == contents(expected)
    assert [index for index, *_ in records(folder, manifest)] == list(range(manifest.count))


def test_seventy_kills_at_random_moments_lose_double_and_alter_nothing(tmp_path):
    """Three workers at a time, each killed by a real SIGKILL whenever it comes, until the kills are used up."""
    manifest = manifest_of(count=1200, records_per_shard=4)
    expected = make_couplings(tmp_path / "expected", manifest)
    folder, moments, kills = open_stage(tmp_path / "pairs", manifest), random.Random(0), 0
    workers = [start(work, folder, manifest) for _ in range(3)]
    while kills < 70:
        time.sleep(moments.uniform(0.0, 0.03))
        victim = moments.randrange(3)
        workers[victim].kill()
        workers[victim].join()
        kills += workers[victim].exitcode == -signal.SIGKILL
        assert workers[victim].exitcode in (0, -signal.SIGKILL)
        if workers[victim].exitcode == 0:  # all is made: take some away, as a bad disk would
            for shard in moments.sample(range(300), 100):
                sidecar_path(folder, shard).unlink(missing_ok=True)
        workers[victim] = start(work, folder, manifest)
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    Leases(folder).clear()
    assert kills == 70
    assert verify(folder) == []
    assert records(folder, manifest) == records(expected, manifest)
    assert contents(folder) == contents(expected)
