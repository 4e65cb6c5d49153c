import weakref
from pathlib import Path

import pytest
import torch

from instaflow.errors import DataError
from instaflow.training import checkpoint
from instaflow.training.checkpoint import Checkpoint, complete_checkpoints, load_checkpoint, save_checkpoint


def checkpoint_at(samples):
    tensor = torch.full((2, 3), float(samples))
    whole = torch.tensor(7)
    return Checkpoint(
        {"net.weight": tensor.T, "count": whole},  # not contiguous
        {"net.weight": tensor + 1},
        {"net.weight/exp_avg": tensor + 2},
        {"samples_seen": samples, "loss_sum": 0.1 + samples},
        Path(f"{samples:012d}"),
    )


def save(folder, checkpoint, **keywords):
    parts = {name: getattr(checkpoint, name).items() for name in ("model", "ema", "optimizer")}
    return save_checkpoint(folder, parts, checkpoint.state, **keywords)


def equal(one, other):
    tensors = all(
        getattr(one, part).keys() == getattr(other, part).keys()
        and all(torch.equal(value, getattr(other, part)[key]) for key, value in getattr(one, part).items())
        for part in ("model", "ema", "optimizer")
    )
    return tensors and one.state == other.state


def test_round_trip(tmp_path):
    folder = tmp_path / "checkpoints"
    assert load_checkpoint(folder) is None
    for samples in (64, 128, 1_000_000, 2_000_000_000):
        place = save(folder, checkpoint_at(samples))
        assert equal(load_checkpoint(folder), checkpoint_at(samples))
        assert complete_checkpoints(folder)[-1] == place
    assert [int(path.name) for path in complete_checkpoints(folder)] == [1_000_000, 2_000_000_000]  # the last two


def test_saving_holds_one_part_and_loading_one_tensor_at_a_time(tmp_path):
    alive = weakref.WeakSet()

    def entries(part):
        assert not alive  # the part before is let go
        for number in range(3):
            alive.add(tensor := torch.full((5,), float(number)))
            yield f"{part}.{number}", tensor

    save_checkpoint(tmp_path, {part: entries(part) for part in ("model", "ema", "optimizer")}, {"samples_seen": 0})
    saved = load_checkpoint(tmp_path)
    for part in ("ema", "optimizer"):
        tensors = getattr(saved, part)
        assert sorted(tensors) == [f"{part}.{number}" for number in range(3)] and len(tensors) == 3
        tensors[f"{part}.2"].zero_()  # nobody keeps it
        assert torch.equal(tensors[f"{part}.2"], torch.full((5,), 2.0))
        assert f"{part}.3" not in tensors and tensors.get(f"{part}.3") is None


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, None, [70]),
        (3, None, [50, 60, 70]),
        (1, 20, [20, 40, 60, 70]),
        (2, 25, [30, 50, 60, 70]),
        (1, 1000, [70]),
    ],
)
def test_checkpoints_that_stay(tmp_path, keep, every, left):
    for samples in range(0, 71, 10):
        save(tmp_path, checkpoint_at(samples), keep=keep, keep_every=every)
    assert [int(path.name) for path in complete_checkpoints(tmp_path)] == left


class Killed(BaseException):
    """As `kill -9` does, it leaves things as they are."""


WRITES = [
    "save_file 0",
    "save_file 1",
    "save_file 2",
    "write_json 0",
    "replace_folder 0",
    "rename 0",
    "rmtree 0",
    "rmtree 2",
]


@pytest.mark.parametrize("write", WRITES)
def test_a_kill_between_writes_leaves_the_former(tmp_path, monkeypatch, write):
    name, count = write.split()
    save(tmp_path, checkpoint_at(0))
    save(tmp_path, checkpoint_at(1))
    calls = []
    place = {"rename": checkpoint.Path, "rmtree": checkpoint.shutil}.get(name, checkpoint)
    real = getattr(place, name)

    def deadly(*arguments, **keywords):
        calls.append(name)
        if len(calls) > int(count):
            raise Killed
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, deadly)
        with pytest.raises(Killed):
            save(tmp_path, checkpoint_at(2))
    newest = 2 if write in ("rename 0", "rmtree 2") else 1  # those clear up after the new one is complete
    for path in complete_checkpoints(tmp_path):
        assert len(list(path.iterdir())) == 4
    assert equal(load_checkpoint(tmp_path), checkpoint_at(newest))
    save(tmp_path, checkpoint_at(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{newest:012d}", f"{3:012d}"]  # nothing lies about


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "turned"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, name, damage):
    save(tmp_path, checkpoint_at(1))
    newest = save(tmp_path, checkpoint_at(2))
    file = newest / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "turned":  # one bit, somewhere in the tensors or in a hash
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(DataError, match=newest.name) as caught:
        load_checkpoint(tmp_path)
    assert f"rm -r {newest}" in caught.value.hint
    checkpoint.shutil.rmtree(newest)  # what the hint says
    assert equal(load_checkpoint(tmp_path), checkpoint_at(1))


def test_what_a_user_puts_beside_checkpoints_stays_and_is_none(tmp_path):
    for name in ("000000000064.bak", "7", "9notes"):
        (tmp_path / name).mkdir()
    (tmp_path / ".x.tmp").write_text("mine")
    for samples in (64, 128, 192):
        save(tmp_path, checkpoint_at(samples), keep=1, keep_every=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"000000000064.bak", "7", "9notes", ".x.tmp", f"{192:012d}"}
    assert load_checkpoint(tmp_path).state["samples_seen"] == 192


def test_multiples_that_were_jumped_over_are_not_made_up_for(tmp_path):
    for samples in (250, 280, 320, 330, 340):
        save(tmp_path, checkpoint_at(samples), keep=1, keep_every=100)
    assert [int(path.name) for path in complete_checkpoints(tmp_path)] == [250, 320, 340]
