"""The papers' protocols: which captions, which real images, what is kept of them, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.errors import ConfigError, DataError
from instaflow.evaluation import references
from instaflow.evaluation.image_protocol import ImageProtocol
from instaflow.evaluation.presets import PRESETS, Preset, captions_of, classes_in_turn, look_at_real
from instaflow.evaluation.references import RealImages, reference_features
from tests.evaluation.stand_ins import pixels

EACH, ANY = Preset(2, 16, one_an_image=True), Preset(2, 16)


@pytest.fixture
def coco(tmp_path):
    """Two images with two captions each, out of order."""
    rows = [(9, 31, "late"), (2, 30, " first of two\n"), (9, 12, "first of nine"), (2, 33, "again")]
    file = tmp_path / "captions.json"
    rows_of_json = [{"image_id": image, "id": number, "caption": text} for image, number, text in rows]
    file.write_text(json.dumps({"annotations": rows_of_json}))
    return str(file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three images of different sizes, one in a subfolder, a file that is none, and a folder called as if it were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "val"
    (place / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (30, 20)), ("a.JPG", (20, 44)), ("more/c.webp", (16, 16))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(place / name)
    (place / "notes.txt").write_text("no image")
    (place / "folder.png").mkdir()
    return place


def test_the_first_caption_of_each_image_or_any_by_the_seed(coco):
    assert captions_of(coco, EACH, 2, seed=0) == (["first of two", "first of nine"], "")
    drawn = {seed: captions_of(coco, ANY, 3, seed)[0] for seed in range(4)}
    assert all(len(set(found)) == 3 for found in drawn.values())
    assert captions_of(coco, ANY, 3, 0)[0] == drawn[0] and len({tuple(found) for found in drawn.values()}) > 1


def test_captions_that_say_nothing_are_left_out_and_told(tmp_path):
    captions = ["", " \t", None, "a cat", "a dog"]
    rows = [{"image_id": 1 + (place > 3), "id": place, "caption": text} for place, text in enumerate(captions)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    found, told = captions_of(str(tmp_path / "captions.json"), EACH, 2, seed=0)
    assert found == ["a cat", "a dog"] and told.endswith("captions.json' are left out: 2 blank, 1 null")
    (tmp_path / "list.txt").write_text("\na cat\n")
    found, told = captions_of(str(tmp_path / "list.txt"), EACH, 1, seed=0)
    assert found == ["a cat"] and told.endswith("list.txt' are left out: 1 blank")


@pytest.mark.parametrize(
    ("caption", "said"),
    [('"half \\ud800"', "annotation 2 has half a character"), ("5", "annotation 2 must be a text, not 5")],
)
def test_a_caption_that_is_no_text_is_refused_with_its_place(tmp_path, caption, said):
    rows = '{"image_id": 1, "id": 7, "caption": "a cat"}, {"image_id": 2, "id": 3, "caption": ' + caption + "}"
    (tmp_path / "captions.json").write_text(f'{{"annotations": [{rows}]}}')
    with pytest.raises(ConfigError, match=said):
        captions_of(str(tmp_path / "captions.json"), EACH, 2, seed=0)


def test_any_file_of_prompts_gives_its_first_ones(tmp_path):
    (tmp_path / "list.txt").write_text("one\ntwo\nthree\n")
    assert captions_of(str(tmp_path / "list.txt"), ANY, 2, seed=5) == (["one", "two"], "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "it has no 'annotations'"),
        ("[", "Expecting value"),
        ('{"annotations": [{"id": 1, "caption": "a"}]}', "one has no 'image_id'"),
        ('{"annotations": [{"image_id": 1e999, "id": 1, "caption": "a"}]}', "infinity"),
        ('{"annotations": 3}', "not iterable"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_is_no_coco_s_is_refused(tmp_path, content, said):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ConfigError, match=f"holds no captions of COCO: .*{said}"):
        captions_of(str(tmp_path / "captions.json"), EACH, 2, seed=0)


def test_too_few_captions_are_refused(coco):
    with pytest.raises(ConfigError, match="holds 2 captions, and 3 are asked for"):
        captions_of(coco, EACH, 3, seed=0)


def test_the_presets_are_the_papers():
    sizes = {name: (preset.num_samples, preset.side, preset.classes) for name, preset in PRESETS.items()}
    assert sizes == {
        "coco2017-5k": (5000, 512, 0),
        "coco2014-30k": (30000, 256, 0),
        "imagenet64-50k": (50000, 64, 1000),
    }


def test_real_images_of_another_number_than_the_protocol_s_are_told(folder):
    preset = PRESETS["coco2014-30k"]
    with pytest.raises(ConfigError, match="holds 3 images; precision and recall want at least 4"):
        look_at_real(folder, preset)
    (folder / "d.jpeg").write_bytes(b"")
    assert "holds 4 real images, not the 40,504 of val2014: not to be compared" in look_at_real(folder, preset)
    assert look_at_real(folder, replace(preset, num_real=4)) == look_at_real(folder, Preset(2, 16)) == ""


class Width:
    """In a CLIP's place: its score is an image's width."""

    def __str__(self) -> str:
        return "width"

    resize = ""

    def scores(self, images, prompts, *, prefix, batch_size):
        return np.full(len(prompts), float(images.shape[-1]))


def test_a_clip_sees_whole_images(folder):
    protocol = ImageProtocol(Preset(2, 16), ["a", "b"], RealImages.of(folder), pixels(4), Width())
    assert protocol.figures(protocol.observe(torch.zeros(2, 3, 32, 32), slice(0, 2))) == {"clip_score": 32.0}
    assert protocol.parts({"scores": np.array([31.0, 33.0])})["clip_score"].tolist() == [31, 33]


def test_classes_are_asked_for_in_turn():
    prompts = classes_in_turn(PRESETS["imagenet64-50k"], 50_000)
    assert prompts[:2] + prompts[999:1001] == ["0", "1", "999", "0"] and len(prompts) == 50_000


def test_real_images_are_those_of_the_folder_in_order_and_their_hash_tells_them(folder):
    real = RealImages.of(folder)
    assert [file.name for file in real.files] == ["a.JPG", "b.png", "c.webp"]
    again = RealImages.of(folder).content
    (folder / "b.png").rename(folder / "d.png")
    assert again == real.content != RealImages.of(folder).content


def test_a_real_image_is_its_middle_by_lanczos(folder):
    with Image.open(folder / "b.png") as image:  # 20 wide, 30 high
        expected = image.resize((16, 16), Image.Resampling.LANCZOS, box=(0, 5, 20, 25))
    assert np.array_equal(RealImages.of(folder).image(1, 16).permute(1, 2, 0), np.asarray(expected))


def test_references_are_computed_once_and_anew_for_other_images(folder, tmp_path, monkeypatch):
    extractor = pixels(2)
    found = reference_features(RealImages.of(folder), extractor, 16, 2, tmp_path / "kept")
    expected = extractor(RealImages.of(folder).batch(slice(0, 3), 16))
    assert found.shape == (3, 12) and np.allclose(found, expected)
    calls = []
    monkeypatch.setattr(
        references.RealImages, "image", lambda *words: calls.append(words) or torch.zeros(3, 16, 16, dtype=torch.uint8)
    )
    assert (
        np.array_equal(reference_features(RealImages.of(folder), extractor, 16, 2, tmp_path / "kept"), found)
        and not calls
    )
    (folder / "b.png").unlink()
    assert len(reference_features(RealImages.of(folder), extractor, 16, 2, tmp_path / "kept")) == 2 and len(calls) == 2
    reference_features(RealImages.of(folder), pixels(4), 16, 2, tmp_path / "kept")
    assert len(calls) == 4
    reference_features(RealImages.of(folder), pixels(4), 8, 2, tmp_path / "kept")
    assert len(calls) == 6


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, damage):
    found = reference_features(RealImages.of(folder), pixels(2), 16, 2, tmp_path / "kept")
    [file] = (tmp_path / "cache" / "instaflow" / "references").glob("*.features")
    content = file.read_bytes()
    file.write_bytes(content[:-9] if damage == "cut" else content[:-9] + bytes(9))
    assert np.array_equal(reference_features(RealImages.of(folder), pixels(2), 16, 2, tmp_path / "kept"), found)


def test_what_is_no_folder_of_images_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        RealImages.of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds none"):
        RealImages.of(tmp_path / "empty")
    (folder / "b.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(DataError, match=r"b\.png' is no image that can be read"):
        RealImages.of(folder).image(1, 16)


def test_images_are_made_small_and_rounded_before_they_are_judged(folder):
    protocol = ImageProtocol(Preset(2, 16), ["a", "b"], RealImages.of(folder), pixels(4), None)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = protocol.observe(images, slice(0, 2))
    in_bytes = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    small = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.LANCZOS)) for image in in_bytes]
    expected = pixels(4)(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
    assert found.keys() == {"features"} and np.array_equal(found["features"][:, 0], expected)
    assert protocol.figures(found) == {"clip_score": None} and protocol.parts(found) == {}
    assert "3 images, SHA-256" in protocol.reference_in_words and "to 16×16" in protocol.reference_in_words
