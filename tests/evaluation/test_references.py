"""Features of real images: shared by processes, kept by the batch until all are there, and then in the cache."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.errors import ConfigError, DataError, Interrupted
from instaflow.evaluation import references
from instaflow.evaluation.observations import Observations
from instaflow.evaluation.references import RealImages, reference_features
from instaflow.files import fingerprint_of, listing_hash, temporary_name
from tests.evaluation.stand_ins import pixels
from tests.pipelines.runs import together


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Seven images, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "val"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def found(real: Path, kept: Path, leave=lambda: None) -> np.ndarray:
    return reference_features(RealImages.of(real), pixels(2), 16, 2, kept, leave)


def in_cache(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache" / "instaflow" / "references").glob("*.features")]


def expected(real: Path) -> np.ndarray:
    images = RealImages.of(real)
    return np.concatenate([pixels(2)(images.batch(slice(start, min(start + 2, 7)), 16)) for start in range(0, 7, 2)])


@pytest.mark.slow
def test_two_processes_share_the_images_and_come_to_the_features_of_one(real, tmp_path):
    together(2, real, tmp_path / "kept", tmp_path / "two.npy", module="tests.evaluation.references_worker")
    assert [(tmp_path / f"two.npy-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert np.array_equal(np.load(tmp_path / "two.npy"), expected(real))
    [file] = in_cache(tmp_path)
    assert not [*(tmp_path / "kept").iterdir()]  # the cache has them
    assert np.array_equal(found(real, tmp_path / "elsewhere"), expected(real)) and not (tmp_path / "elsewhere").exists()
    file.unlink()
    assert np.array_equal(found(real, tmp_path / "kept"), expected(real))


def test_what_was_stopped_goes_on(real, tmp_path, monkeypatch):
    asked = []

    def leave():
        asked.append(0)
        if len(asked) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        found(real, tmp_path / "kept", leave)
    assert len([*(tmp_path / "kept").rglob("*.observed")]) == 2 and not in_cache(tmp_path)
    seen = []
    read = RealImages.image
    monkeypatch.setattr(RealImages, "image", lambda self, index, side: seen.append(index) or read(self, index, side))
    assert np.array_equal(found(real, tmp_path / "kept"), expected(real))
    assert seen[:3] == [4, 5, 6] and len(seen) == 3 + 7  # the latter are those that are expected


@pytest.mark.parametrize("fault", ["a file in its place", "no more room", "closed to us"])
def test_where_the_cache_cannot_be_written_the_features_stay_with_the_report(
    real, tmp_path, monkeypatch, caplog, fault
):
    if fault == "a file in its place":
        (tmp_path / "cache").write_text("")
    elif fault == "no more room":

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(references, "write_file", full)
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "cache").mkdir(mode=0o500)
    assert np.array_equal(found(real, tmp_path / "kept"), expected(real))
    [told] = caplog.messages
    assert str(tmp_path / "cache") in told and str(tmp_path / "kept") in told and "$XDG_CACHE_HOME" in told
    monkeypatch.setattr(RealImages, "image", None)  # none is read again
    assert found(real, tmp_path / "kept").shape == (7, 12)


def test_other_images_never_take_the_batches_of_an_earlier_attempt(real, tmp_path):
    (tmp_path / "cache").write_text("")  # so that all batches stay
    before = found(real, tmp_path / "kept")
    (real / "0.png").write_bytes((real / "1.png").read_bytes())
    after = found(real, tmp_path / "kept")
    assert np.array_equal(after, expected(real)) and not np.array_equal(after, before)
    assert len([*(tmp_path / "kept").iterdir()]) == 2


@pytest.mark.parametrize("change", ["rewritten", "more", "fewer"])
def test_images_that_change_while_they_are_read_are_kept_under_no_name(real, tmp_path, change):
    calls = []

    def meddle():
        calls.append(0)
        if len(calls) == 3:  # when the first four are read
            if change == "rewritten":
                (real / "6.png").write_bytes((real / "1.png").read_bytes())
            elif change == "more":
                (real / "more.png").write_bytes((real / "1.png").read_bytes())
            else:
                (real / "0.png").unlink()

    with pytest.raises(DataError, match="changed while their features were extracted"):
        found(real, tmp_path / "kept", meddle)
    assert not in_cache(tmp_path) and not [*(tmp_path / "kept").rglob("*.observed")]
    again = found(real, tmp_path / "kept")
    assert len(again) == {"rewritten": 7, "more": 8, "fewer": 6}[change]
    assert change != "rewritten" or np.array_equal(again[6], again[1])


def test_batches_of_files_that_were_written_since_are_read_again(real, tmp_path):
    """Killed while an image was another one; it is the old one again when the work goes on."""
    right, calls = (real / "0.png").read_bytes(), []

    def meddle():
        calls.append(0)
        if len(calls) == 1:
            (real / "0.png").write_bytes((real / "1.png").read_bytes())
        if len(calls) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        found(real, tmp_path / "kept", meddle)
    (real / "0.png").write_bytes(right)
    assert np.array_equal(found(real, tmp_path / "kept"), expected(real))
    assert not [*(tmp_path / "kept").glob("*-real")]


def test_an_image_that_cannot_be_read_is_named(real, tmp_path):
    (real / "5.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(DataError, match=r"5\.png' is no image that can be read: .*it is no JPEG, PNG or WebP"):
        found(real, tmp_path / "kept")
    (real / "5.png").write_bytes((real / "4.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"5\.png' is no image that can be read"):
        found(real, tmp_path / "kept")


def test_a_name_that_is_no_text_is_a_name_all_the_same(real, tmp_path):
    before = RealImages.of(real).content, listing_hash(real), fingerprint_of(real)
    (real / "0.png").rename(Path(os.fsdecode(os.fsencode(real) + b"/\xff.png")))
    assert len(found(real, tmp_path / "kept")) == 7
    after = RealImages.of(real).content, listing_hash(real), fingerprint_of(real)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_what_a_killed_writer_left_in_the_cache_is_cleared(real, tmp_path):
    found(real, tmp_path / "kept")
    [file] = in_cache(tmp_path)
    file.unlink()
    left = file.with_name(temporary_name(file.name).rpartition("-")[0] + "-4194304")  # a process that is none
    left.write_bytes(b"half")
    found(real, tmp_path / "kept")
    assert in_cache(tmp_path) == [file] and not left.exists()


def test_processes_that_see_other_files_are_told(real, monkeypatch):
    monkeypatch.setattr(references, "gather", lambda value: [value, b"another"])
    with pytest.raises(ConfigError, match="holds other files for one process than for another"):
        RealImages.of(real)


def test_a_damaged_batch_is_extracted_anew(real, tmp_path):
    (tmp_path / "cache").write_text("")
    found(real, tmp_path / "kept")
    file = sorted((tmp_path / "kept").rglob("*.observed"))[1]
    file.write_bytes(file.read_bytes()[:-4])
    [folder] = (tmp_path / "kept").iterdir()
    assert Observations(folder, 7, 2).missing() == [slice(2, 4)]
    assert np.array_equal(found(real, tmp_path / "kept"), expected(real))
