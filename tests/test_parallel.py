import os
import signal
import time

import pytest

from instaflow.errors import DataError, InstaFlowError
from instaflow.parallel import cores, spread


def square(number):
    return number**2, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_item_is_worked_on_once(workers):
    found = list(spread(square, list(range(40)), workers=workers))
    assert sorted(result for result, _ in found) == [number**2 for number in range(40)]
    assert ({process for _, process in found} == {os.getpid()}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_no_items_no_work(workers):
    assert list(spread(square, [], workers=workers)) == []


def test_one_item_needs_no_process_of_its_own():
    assert list(spread(square, [3], workers=4)) == [(9, os.getpid())]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_ends_it_in_the_midst_of_an_item(workers):
    done = []
    sleepy = (lambda item: time.sleep(600)) if workers > 1 else done.append
    started = time.monotonic()
    assert list(spread(sleepy, [1, 2, 3], workers=workers, stop=lambda: time.monotonic() - started > 0.3 or done)) == (
        [None] if workers == 1 else []
    )


def test_who_stops_listening_ends_the_processes():
    results = spread(square, list(range(1000)), workers=2)
    next(results)
    children = set(children_of_this_process())
    results.close()
    deadline = time.monotonic() + 10
    while children & set(children_of_this_process()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(children) == 2 and not children & set(children_of_this_process())


def children_of_this_process():
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children()]


def refuse(item):
    if item == 2:
        raise DataError("no", "do")
    return item


def fail(item):
    raise LookupError(item)


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_for_the_user_comes_through_with_its_hint():
    with pytest.raises(InstaFlowError, match="no") as caught:
        list(spread(refuse, [1, 2, 3], workers=2))
    assert caught.value.hint == "do"


def test_a_process_that_fails_or_is_killed_is_an_error_and_no_silence(capfd):
    with pytest.raises(RuntimeError, match="its traceback stands above"):
        list(spread(fail, [1, 2], workers=2))
    assert "LookupError: " in capfd.readouterr().err
    with pytest.raises(InstaFlowError, match="was ended by SIGKILL") as caught:
        list(spread(die, [1, 2], workers=2))
    assert "--workers" in caught.value.hint


def test_ctrl_c_is_the_parent_s_to_answer():
    def ignore(item):
        os.kill(os.getpid(), signal.SIGINT)
        return item

    assert sorted(spread(ignore, [1, 2, 3], workers=2)) == [1, 2, 3]


def test_there_is_a_core():
    assert cores() >= 1
