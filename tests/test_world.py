import subprocess
import sys

import pytest

from instaflow.errors import InstaFlowError
from instaflow.world import World, barrier, world


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


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
