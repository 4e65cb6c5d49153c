"""What networks need, counted without weights, against published numbers and against real tensors."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from instaflow.errors import DataError
from instaflow.models.architecture import read_architecture
from instaflow.models.families import HUB_NAMES, SD1, SD2, SD2_V, XL, architecture_of
from instaflow.models.sampling import network_flops
from pipelines.plan import digits_architecture
from tests.models.made import load, write_flow, write_published

CLIP_L, CLIP_H, CLIP_G = 123_060_480, 340_387_840, 694_659_840
VAE = 83_653_863


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A hub cache of this test's own, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("family", "unet", "text"),
    [
        (SD1, 859_520_964, CLIP_L),
        (SD2, 865_910_724, CLIP_H),
        (SD2_V, 865_910_724, CLIP_H),
        (XL, 2_567_463_684, CLIP_L + CLIP_G),
    ],
    ids=["sd1", "sd2", "sd2-v", "xl"],
)
def test_the_families_have_the_published_numbers_of_parameters(family, unet, text):
    assert family.parameters() == {"unet": unet, "vae": VAE, "text": text}


def test_a_call_of_stable_diffusion_1_5_takes_0_8_tflop():
    found = SD1.flops()
    assert found["unet"] == pytest.approx(0.803e12, rel=1e-3)  # 0.4 T multiplications with their additions
    assert found["text"] == pytest.approx(2 * 77 * 86e6, rel=0.02)  # but for the embeddings every weight meets a token
    assert 2 < found["decode"] / found["encode"] < 2.5


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_folder_tells_its_architecture(tmp_path, family):
    folder = write_published(tmp_path / family, family)
    model = load(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    found = architecture_of(str(folder))
    assert found.is_xl == (family == "xl")
    assert (found.latent_shape, found.image_size) == (model.latent_shape, model.image_size)
    hidden, pooled = model.embed([None])
    assert found.embedding_shape == hidden.shape[1:]
    assert found.pooled_size == (0 if pooled is None else pooled.shape[1])
    assert found.parameters()["unet"] == sum(parameter.numel() for parameter in model.unet.parameters())
    assert found.flops()["unet"] == network_flops(model)


def test_a_flow_s_folder_tells_how_it_is_sampled(tmp_path):
    settings = read_architecture(write_flow(tmp_path / "flow", "velocity")).settings
    assert (settings.kind, settings.parametrization, settings.guidance_scale) == ("flow", "velocity", 1.5)


def test_a_known_hub_name_needs_no_files_and_a_cached_one_is_read(tmp_path, cache):
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    assert architecture_of(name) is HUB_NAMES[name] is XL
    with pytest.raises(DataError, match="'someone/something' is made of is not known") as caught:
        architecture_of("someone/something")
    assert "hf download someone/something" in caught.value.hint
    written = write_published(tmp_path / "published", "sd2-v")
    repository = cache / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    written.rename(repository / "snapshots" / ("0" * 40))
    assert architecture_of("someone/something").scheduler["prediction_type"] == "v_prediction"


def test_a_place_where_nothing_is_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not known on this machine"):
        architecture_of(str(tmp_path / "gone"))


def highest(work) -> int:
    """The most bytes that the CPU's allocator has handed out as an operation of `work` ends, by PyTorch's profiler.

    What a kernel takes and gives back meanwhile is left out: it depends on the processor. Where that has no bfloat16,
    a convolution's backward pass unfolds all images.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = end = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.start_ns() > end:
            most = max(most, now)
        if event.name() == "[memory]":
            now += event.nbytes()
        elif event.name().startswith("aten::"):
            end = max(end, event.end_ns())
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_training_s_memory_is_that_of_a_real_one(bfloat16, checkpointing):
    architecture, batch = digits_architecture(), 128
    unet = architecture.build_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def work():
        noise = torch.randn(batch, *architecture.latent_shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = unet(noise, torch.zeros(batch), torch.randn(batch, *architecture.embedding_shape)).sample
            loss = output.float().square().mean()
        loss.backward()

    work()  # from now on every weight has its gradient's place
    counted = architecture.training_memory(batch, bfloat16=bfloat16, checkpointing=checkpointing)
    assert counted == pytest.approx(highest(work), rel=0.03)


def test_gradient_checkpointing_and_smaller_batches_take_less():
    architecture = digits_architecture()
    usual = architecture.training_memory(32)
    assert architecture.training_memory(32, checkpointing=True) < 0.8 * usual
    assert architecture.training_memory(16) == pytest.approx(usual / 2, rel=0.05)
    assert architecture.sampling_memory(32, torch.float32) < 0.5 * usual
    half, single = (architecture.sampling_memory(32, dtype) for dtype in (torch.float16, torch.float32))
    assert half == pytest.approx(single / 2, rel=0.05)
