import numpy as np
import pytest

from instaflow.errors import InstaFlowError
from instaflow.evaluation import precision_recall as module
from instaflow.evaluation.precision_recall import precision_recall


def by_hand(made, real, k):
    def within(points, others):
        """The share of `points` in a ball of some other, by the definition."""
        radii = [sorted(np.linalg.norm(others - other, axis=1))[k] for other in others]  # at 0 it is itself
        return np.mean([any(np.linalg.norm(point - others, axis=1) <= radii) for point in points])

    return within(made, real), within(real, made)


@pytest.mark.parametrize("k", [1, 3])
def test_the_shares_are_those_of_the_definition(k, monkeypatch):
    rng = np.random.default_rng(0)
    made, real = rng.standard_normal((70, 6)), rng.standard_normal((90, 6)) * 1.2 + 1.2
    found = precision_recall(made, real, neighbours=k)
    assert (found.precision, found.recall) == pytest.approx(by_hand(made, real, k))
    assert 0.05 < found.recall < found.precision < 0.99
    monkeypatch.setattr(module, "ROWS", 16)
    assert precision_recall(made, real, neighbours=k) == found  # distances are computed a part at a time


def test_modes_that_are_left_out_cost_recall_and_those_made_up_cost_precision():
    rng = np.random.default_rng(1)
    modes = np.eye(4) * 100

    def drawn(counts):
        return np.concatenate([mode + rng.uniform(size=(count, 4)) for mode, count in zip(modes, counts, strict=True)])

    real = drawn([200, 200, 0, 0])
    narrow = precision_recall(drawn([200, 0, 0, 0]), real)
    assert narrow.precision > 0.9 and 0.4 < narrow.recall <= 0.5
    strange = precision_recall(drawn([200, 200, 200, 0]), real)
    assert 0.6 < strange.precision <= 2 / 3 and strange.recall > 0.9
    apart = precision_recall(drawn([0, 0, 100, 100]), real)
    assert (apart.precision, apart.recall) == (0, 0)


def test_a_set_beside_itself_is_all_within():
    same = np.random.default_rng(2).standard_normal((50, 8)) + 20
    found = precision_recall(same, same)
    assert (found.precision, found.recall, found.neighbours) == (1, 1, 3)


@pytest.mark.parametrize(
    ("made", "real", "message"),
    [
        (np.zeros((3, 4)), np.zeros((9, 4)), "more samples than that on each side, not 3"),
        (np.zeros((9, 3)), np.zeros((9, 4)), r"the shapes \[9, 3\] and \[9, 4\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(made, real, message):
    with pytest.raises(InstaFlowError, match=message):
        precision_recall(made, real)
