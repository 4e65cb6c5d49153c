"""What is observed is kept by the batch: whole or absent, shared by processes, joined in order."""

import json

import numpy as np
import pytest

from instaflow.errors import ConfigError, DataError
from instaflow.evaluation.card import OF_LOOKS, Card, check_alike, difference, prompts_hash
from instaflow.evaluation.observations import Observations
from pipelines.observing import together

BATCHES = [slice(0, 4), slice(4, 8), slice(8, 10)]
CARD = {
    **dict.fromkeys(("model", "model_content", "weights", "sampler", "protocol", "prompts", "noise"), "a"),
    **dict.fromkeys(("dtype", "image_size", "image_encoding", "features", "reference", "hardware"), "b"),
    **dict.fromkeys(("num_steps", "guidance_scale", "num_samples", "seed", "batch_size", "processes"), 1),
}


@pytest.fixture
def kept(tmp_path):
    observations = Observations(tmp_path / "kept", 10, 4)
    observations.begin({"protocol": "digits"})
    return observations


def seen(batch: slice) -> dict[str, np.ndarray]:
    indices = np.arange(batch.start, batch.stop)
    return {"features": indices[:, None] * np.ones(3), "images": indices[indices < 5].astype(np.uint8)}


def test_batches_are_joined_in_order_whoever_wrote_them(kept):
    for batch in reversed(BATCHES):
        kept.write(batch, seen(batch))
    joined = kept.joined()
    assert np.array_equal(joined["features"], np.arange(10)[:, None] * np.ones(3))
    assert np.array_equal(joined["images"], np.arange(5)) and joined["images"].dtype == np.uint8
    assert json.loads((kept.folder / "card.json").read_text()) == {"protocol": "digits"}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_all_batches(kept, size):
    shares = [kept.missing(rank, size) for rank in range(size)]
    assert sorted((batch for share in shares for batch in share), key=lambda batch: batch.start) == BATCHES
    kept.write(BATCHES[1], seen(BATCHES[1]))
    assert BATCHES[1] not in [batch for rank in range(size) for batch in kept.missing(rank, size)]


def test_a_damaged_batch_is_missing(kept):
    for batch in BATCHES:
        kept.write(batch, seen(batch))
    [first, second, third] = sorted(kept.folder.glob("*.observed"))
    first.write_bytes(first.read_bytes()[:-8])
    second.write_bytes(b"")
    third.write_bytes(third.read_bytes()[:-8] + bytes(8))
    assert kept.missing() == BATCHES
    with pytest.raises(DataError, match="is damaged"):
        kept.joined()
    first.unlink()
    first.mkdir()
    assert kept.missing() == BATCHES


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"5"])
def test_a_card_that_is_none_is_written_anew(kept, content):
    (kept.folder / "card.json").write_bytes(content)
    assert kept.card() == {}
    kept.begin({"protocol": "digits"})
    assert kept.card() == {"protocol": "digits"}


def test_what_killed_writers_left_is_cleared(kept):
    kept.write(BATCHES[0], seen(BATCHES[0]))
    left = kept.folder / ".000004-000008.observed.tmp-1"  # a writer that is none
    left.write_bytes(b"half")
    kept.begin({})
    assert not left.exists() and kept.missing() == BATCHES[1:]


def test_other_batches_do_not_mix(kept):
    for batch in BATCHES:
        kept.write(batch, seen(batch))
    other = Observations(kept.folder, 10, 5)
    assert other.missing() == [slice(0, 5), slice(5, 10)]


def test_every_batch_tells_in_which_circumstances_it_was_made(kept):
    one, other = (
        {"hardware": name, "versions": {"torch": version}} for name, version in (("A100", "3"), ("H100", "4"))
    )
    for batch, made in zip(BATCHES, (one, other, one), strict=True):
        kept.write(batch, seen(batch), made)
    assert kept.circumstances() == [one, other]
    found = together(kept.circumstances())
    assert found == {"hardware": "A100 and H100", "versions": {"torch": "3 and 4"}}
    assert together([one, one]) == one and together([{}]) == {}
    next(kept.folder.glob("000000*")).write_bytes(b"torn")
    assert kept.circumstances() == [other, one]


def test_a_batch_that_tells_no_circumstances_has_those_of_the_folder_s_card(tmp_path):
    earlier = Observations(tmp_path, 10, 4)
    earlier.begin({"hardware": "A100", "processes": 2})
    earlier.write(BATCHES[0], seen(BATCHES[0]))
    earlier.begin({"hardware": "H100", "processes": 2})  # who goes on tells it of its own batches
    earlier.write(BATCHES[1], seen(BATCHES[1]), {"hardware": "H100", "processes": 2})
    assert together(earlier.circumstances()) == {"hardware": "A100 and H100", "processes": 2}


def test_batches_of_another_size_are_removed_and_no_others(kept):
    for batch in BATCHES:
        kept.write(batch, seen(batch))
    (kept.folder / ".000000-000004.observed.tmp-elsewhere-1-1").write_bytes(b"being written")
    kept.remove_others()
    assert kept.missing() == []
    other = Observations(kept.folder, 10, 8)
    other.write(slice(0, 8), seen(slice(0, 8)))
    other.remove_others()
    left = {file.name for file in kept.folder.iterdir()}
    own = {"000000-000008.observed", "000008-000010.observed"}  # the last one is the same in both
    assert left == own | {"card.json", ".000000-000004.observed.tmp-elsewhere-1-1"}


def test_a_key_tells_subjects_and_protocols_apart_and_no_circumstances():
    card = Card(**CARD)
    keys = {Card(**{**CARD, name: "other"}).key() for name in CARD}
    same = {Card(**{**CARD, name: "other"}).key() for name in ("model", "batch_size", "processes", "hardware")}
    same |= {Card(**CARD, versions={"torch": "3"}).key(), Card(**CARD, perceptual="other", diversity="other").key()}
    same |= {Card(**CARD, kernel="other", straightness="other").key()}
    assert same == {card.key()} and len(keys) == len(CARD) - 3


def test_cards_compare_where_their_protocols_are_the_same():
    assert difference(CARD, {**CARD, "model": "other", "num_steps": 4, "hardware": "other"}) is None
    assert difference(CARD, {**CARD, "perceptual": ""}) is None  # which an earlier version's cards lack
    assert difference(CARD, {**CARD, "kernel": "9 subsets"}) is None  # measured before it was told, in one way
    assert difference({**CARD, "kernel": "9 subsets"}, {**CARD, "kernel": "8 subsets"})[0] == "kernel"
    assert difference({**CARD, "straightness": "9 paths"}, {**CARD, "straightness": "8 paths"}) is None
    for name in ("num_samples", "seed", "features", "reference", "dtype", "judge", "perceptual", "diversity"):
        assert difference(CARD, {**CARD, name: "other"}) == (name, CARD.get(name, ""), "other")
        assert difference(CARD, {**CARD, name: "other"}, but=(name,)) is None
    check_alike([("a", CARD), ("b", {**CARD, "model": "b"})])
    check_alike([("a", CARD), ("b", {**CARD, "perceptual": "other"})], but=OF_LOOKS)
    with pytest.raises(ConfigError, match="a and b were measured by different protocols"):
        check_alike([("a", CARD), ("b", {**CARD, "seed": 1.5})])
    with pytest.raises(
        ConfigError, match="a and c were measured by different protocols: 'reference' is 'b' of the first"
    ):
        check_alike([("a", CARD), ("b", {**CARD, "model": "b"}), ("c", {**CARD, "reference": "other"})])


def test_a_hash_of_prompts_tells_their_order():
    assert prompts_hash(["a", "b"]) != prompts_hash(["b", "a"])
    assert prompts_hash(["ab", "c"]) != prompts_hash(["a", "bc"])
    assert prompts_hash(["a"] * 2000).startswith("2,000 prompts, SHA-256 ")
