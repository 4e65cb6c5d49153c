"""What a server's models draw is what `sample` draws, step by step; and what they say of themselves."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.couplings.noise import coupled_noise
from instaflow.errors import DataError, InstaFlowError
from instaflow.flow.paths import slerp
from instaflow.models.samplers import few_step_scheduler
from instaflow.models.settings import note_on_guidance
from instaflow.places import short_names
from instaflow.serving.painter import Images
from instaflow.serving.requests import ImageRequest
from pipelines.painting import Models
from pipelines.show import run as show
from tests.models.made import ddim, load, teacher_scheduler, write_checked, write_edm, write_flow, write_model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    scheduler = teacher_scheduler()
    return {
        "teacher": write_model(folder / "teacher" / "model", scheduler, num_steps=5, guidance_scale=3.0),
        "flow": write_flow(folder / "flow" / "model", "velocity"),
        "student": write_model(folder / "student" / "model", scheduler, num_steps=1, guidance_scale=1.0),
        "few": write_model(folder / "few", few_step_scheduler(ddim(), 4), num_steps=4, guidance_scale=1.0),
        "edm": write_edm(folder / "edm", class_names=[f"class {number}" for number in range(10)]),
        "unconditional": write_edm(folder / "unconditional", classes=None),
    }


@pytest.fixture(scope="module")
def models(places):
    return Models([str(place) for place in places.values()])


def drawn(models: Models, model: str, **asked: Any) -> tuple[Images, int]:
    """The images, and after how many pauses."""
    work, pauses = models.draw(model, ImageRequest(**({"prompt": "a seven"} | asked))), 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, pauses
        pauses += 1


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)))


def seeded(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(coupled_noise(seed, "sample", [0], shape))


@pytest.mark.parametrize("how", [{}, {"num_steps": 3}, {"num_steps": 1, "guidance_scale": 2.5}])
@pytest.mark.parametrize("name", ["teacher", "flow", "student", "few"])
def test_a_seed_s_image_is_the_first_of_sample(models, places, name, how):
    model = load(places[name])
    for seed in (0, 7):
        latents = model.sample(seeded(seed, model.latent_shape), ["a seven"], **how)
        image = models_image(models, name, seed=seed, **how)
        assert np.array_equal(image, model.pictures(latents)[0].numpy())


def models_image(models: Models, name: str, **asked: Any) -> np.ndarray:
    return pixels(drawn(models, name, **asked)[0].images[0])


def test_between_two_seeds_lies_the_great_circle(models, places):
    model = load(places["student"])
    noise = slerp(seeded(3, model.latent_shape), seeded(4, model.latent_shape), 0.3)
    expected = model.pictures(model.sample(noise, ["a seven"]))[0].numpy()
    assert np.array_equal(models_image(models, "student", seed=3, seed_to=4, position=0.3), expected)
    for seed, position in ((3, 0.0), (4, 1.0)):
        end = models_image(models, "student", seed=3, seed_to=4, position=position)
        assert np.abs(end.astype(int) - models_image(models, "student", seed=seed)).max() <= 1


def test_several_seeds_are_drawn_as_one_by_one(models):
    found, _ = drawn(models, "flow", seeds=[5, 2])
    for image, seed in zip(found.images, (5, 2), strict=True):
        assert np.abs(pixels(image).astype(int) - models_image(models, "flow", seed=seed)).max() <= 1


def test_there_is_a_pause_after_every_step_of_many(models):
    assert drawn(models, "teacher")[1] >= 5
    assert drawn(models, "student")[1] == 0
    assert drawn(models, "few")[1] >= 4  # which draws noise between them


def test_two_drawings_in_turns_give_what_they_give_alone(models):
    alone = [drawn(models, "teacher", seed=seed)[0].images for seed in (1, 2)]
    works = [models.draw("teacher", ImageRequest(prompt="a seven", seed=seed)) for seed in (1, 2)]
    found: dict[int, list[bytes]] = {}
    while len(found) < 2:
        for place, work in enumerate(works):
            if place not in found:
                try:
                    next(work)
                except StopIteration as end:
                    found[place] = end.value.images
    assert [found[0], found[1]] == alone


def test_a_file_holds_how_it_was_drawn(models, places, tmp_path):
    file = tmp_path / "drawn.png"

    def told(**asked: Any) -> dict[str, Any]:
        file.write_bytes(drawn(models, "student", prompt="é 🙂 a <b>", **asked)[0].images[0])
        return json.loads(Image.open(file).text["instaflow"])  # type: ignore[attr-defined, no-any-return]

    about = told(seed=9)
    assert about["images"] == [{"prompt": "é 🙂 a <b>", "seed": "9"}]
    assert (about["models"], about["num_steps"]) == ([str(places["student"])], [1])
    assert (about["guidance_scale"], about["dtype"]) == ([1.0], "float32")
    (image,) = told(seed=9, seed_to=2, position=0.5)["images"]
    assert (image["seed"], image["between"], image["position"]) == (None, ["9", "2"], 0.5)
    assert '- 0.5 of the way from seed 9 to 2: "é 🙂 a <b>"' in show(file)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_long_prompt_is_said_to_be_cut(models, name):
    assert [drawn(models, name, prompt="a seven " * many)[0].truncated for many in (1, 1250, 1)] == [False, True, False]


def test_models_say_what_they_take(models):
    offers = {offer.name: offer for offer in models.offers}
    assert [offer.prompts for offer in offers.values()] == [*["text"] * 4, "class", "none"]
    assert (offers["teacher"].num_steps, offers["teacher"].guidance_scale) == (5, 3.0)
    assert (offers["flow"].kind, offers["flow"].max_tokens, offers["flow"].width) == ("flow", 10, 16)
    assert "class 3" in offers["edm"].classes and "3" in offers["edm"].classes


def test_a_class_is_taken_by_name_or_number_and_another_is_told(models):
    assert np.array_equal(models_image(models, "edm", prompt="class 3"), models_image(models, "edm", prompt="3"))
    with pytest.raises(DataError, match="'dgo' is no class of 'edm'"):
        drawn(models, "edm", prompt="dgo")
    with pytest.raises(DataError, match="without any prompt"):
        drawn(models, "unconditional", prompt="x")
    drawn(models, "unconditional", prompt="")


@pytest.mark.parametrize("how", [{}, {"num_steps": 2}])
def test_images_that_are_not_finite_are_an_error(tmp_path, places, how):
    model = Models([str(places["student"])])
    with torch.no_grad():
        model.models["student"].model.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InstaFlowError, match="'student' gave latents that are not finite"):
        drawn(model, "student", **how)


def test_all_are_tried(models):
    models.try_all()
    assert models.models["student"].drawing is not None


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["runs/digits/student/model", "runs/digits/teacher/model/"], ["student", "teacher"]),
        (["a/student/model", "b/student/model", "b/student/model"], ["student", "student-2", "student-3"]),
        (["a/student/model-raw", "XCLiu/instaflow_0_9B_from_sd_1_5"], ["student-raw", "instaflow_0_9B_from_sd_1_5"]),
        (["some/where.v2", "one.safetensors", "model"], ["where.v2", "one", "model"]),
    ],
)
def test_models_have_short_names(places, names):
    assert short_names(places) == names


def test_a_safety_checker_is_asked_and_its_answer_told(tmp_path):
    place = str(write_checked(tmp_path / "checked", unsafe=True))
    for asked in (True, False):
        made, _ = drawn(Models([place], safety_checker=asked), "checked", num_steps=1, seeds=[3, 4])
        assert [bool(pixels(image).any()) for image in made.images] == [not asked] * 2
        told = "2 images, taken for unsafe by the model's safety checker, are black"
        assert made.note == (told if asked else "")


def test_guidance_for_a_model_that_is_meant_without_is_noted(places, tmp_path):
    one_step = {"kind": "student", "num_steps": 1, "guidance_scale": 1.0}
    student = write_model(tmp_path / "student" / "model", teacher_scheduler(), **one_step)
    models = Models([str(student), str(places["teacher"])])
    note = "'student' is meant without guidance, which is trained in: 7.5 spoils its images"
    for model, scale, told in (("student", 7.5, note), ("student", 1, ""), ("student", 0, ""), ("teacher", 7.5, "")):
        assert drawn(models, model, guidance_scale=scale)[0].note == told
    assert note_on_guidance("a teacher", "teacher", 1.0, 7.5) == ""  # by a recommendation alone
