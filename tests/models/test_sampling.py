"""What all batches share is computed once, no step waits for a device, and a compiled network gives the same."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from instaflow.errors import InstaFlowError
from instaflow.models import sampling
from instaflow.models.samplers import SAMPLERS, coupling_scheduler, few_step_scheduler
from instaflow.models.sampling import Sampling, fetched, network_flops, pays_to_compile
from instaflow.models.states import visited_states
from tests.models.made import ddim, load, noise, write_model, write_published

PROMPTS = ["the digit 7", "an odd digit"]


@pytest.fixture
def teacher(folders):
    return load(folders["teacher"])


def test_the_embedding_of_no_prompt_is_computed_once(teacher):
    seen = []
    teacher.text_encoder.register_forward_pre_hook(lambda module, ids: seen.append(len(ids[0])))
    each = Sampling(teacher, num_steps=2, guidance_scale=3.0)
    for _ in range(3):
        each(noise(), PROMPTS)
    assert seen == [1, 2, 2, 2]
    seen.clear()
    Sampling(teacher, num_steps=2, guidance_scale=1.0)(noise(), PROMPTS)
    assert seen == [2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_batch_leaves_anything_behind_for_the_next(teacher, sampler):
    scheduler = coupling_scheduler(teacher, sampler)
    each = Sampling(teacher, num_steps=4, guidance_scale=3.0, scheduler=scheduler)
    first = each(noise(), PROMPTS)
    each(noise(seed=1), PROMPTS[::-1])
    assert torch.equal(each(noise(), PROMPTS), first)


def test_the_noise_between_steps_is_each_sample_s_own(tmp_path):
    """A network that takes nothing but zeros for the data shows it: its input is σ noise."""
    scheduler = few_step_scheduler(ddim(prediction_type="sample"), 4)
    model, seen = load(write_model(tmp_path / "student", scheduler, kind="student")), []
    model.unet.conv_out.weight.zero_()
    model.unet.conv_out.bias.zero_()
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    each = Sampling(model, num_steps=4, guidance_scale=1.0)

    def between(start: torch.Tensor) -> torch.Tensor:
        seen.clear()
        each(start, ["a digit"] * len(start))
        sigmas = (1 - scheduler.alphas_cumprod[[749, 499, 249]]).sqrt()
        return torch.stack(seen[1:], 1) / sigmas.view(3, 1, 1, 1)  # [B, 3, C, H, W]

    found = between(noise(4))
    assert torch.equal(torch.cat([between(part) for part in noise(4).split(3)]), found)
    numbers = torch.cat([found, between(noise(4, seed=1))]).flatten()
    assert len(numbers.unique()) > 0.99 * len(numbers)  # no two samples, seeds or steps share one
    assert abs(numbers.mean()) < 0.05 and abs(numbers.std() - 1) < 0.05


class Crossings(TorchDispatchMode):
    """The operations that bring values from one device to another, and those that wait for a value."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        source = arguments[0] if arguments else None
        if name in ("_to_copy", "copy_") and isinstance(source, torch.Tensor):
            other = arguments[1] if name == "copy_" else source
            if other.device != result.device:
                self.found.append(f"{name} {other.device} to {result.device}")
        if name in ("_local_scalar_dense", "nonzero") and source.device.type != "cpu":
            self.found.append(name)
        return result


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "unipc"])  # stock UniPC sends coefficients
def test_from_the_first_step_to_the_last_no_device_waits_for_the_other(tmp_path, family, sampler):
    """The meta device stands in for a GPU: a tensor there has no values that could be asked for."""
    model = load(write_published(tmp_path / family, family))
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to("meta")
    each = Sampling(model, num_steps=4, guidance_scale=3.0, scheduler=coupling_scheduler(model, sampler))
    states = visited_states(each.scheduler, 4)
    crossings, counts = Crossings(), []
    model.unet.register_forward_pre_hook(lambda module, inputs: counts.append(len(crossings.found)))
    with crossings:
        sampled = each.sampled(noise(), PROMPTS, states)
        pictures = model.pictures(sampled.latents)
    found = [sampled.latents, *sampled.states, pictures]
    assert [tensor.device.type for tensor in found] == ["meta"] * 6 and len(counts) >= 4
    assert counts[0] > 0  # noise and tokens went there
    assert crossings.found[counts[0] :] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled_for", [None, 2])
def test_on_a_gpu_a_batch_is_queued_without_waiting_and_fetched_beside_the_next(folders, compiled_for):
    model = load(folders["teacher"])
    expected = Sampling(model, num_steps=4, guidance_scale=3.0)(noise(), PROMPTS)
    for part in (model.unet, *model.text_encoders):
        part.to("cuda")
    scheduler = coupling_scheduler(model)
    each = Sampling(model, num_steps=4, guidance_scale=3.0, scheduler=scheduler, compiled_for=compiled_for)
    each(noise(), PROMPTS)
    text = model.embed(PROMPTS)
    model.embed = lambda prompts: text  # the text encoder may wait, once a batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (fetched(each(noise(seed=seed), PROMPTS)) for seed in (0, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.from_numpy(first()), expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(torch.from_numpy(second()), expected, rtol=1e-2, atol=1e-2)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_network_gives_the_same_and_is_compiled_once(folders):
    """A smaller batch, as a shard's last one, is filled up; its own records come back."""
    plain = Sampling(load(folders["teacher"]), num_steps=3, guidance_scale=3.0)
    compiled = Sampling(load(folders["teacher"]), num_steps=3, guidance_scale=3.0, compiled_for=3)
    for count in (3, 1, 2):
        prompts = ["the digit 7", "an odd digit", ""][:count]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(noise(count), prompts)
        torch.testing.assert_close(found, plain(noise(count), prompts), rtol=1e-4, atol=1e-4)


def test_what_fills_a_batch_up_is_not_counted_as_cut(teacher):
    each = Sampling(teacher, num_steps=1, guidance_scale=1.0)
    each.compiled_for = 8  # as if it were
    each(noise(1), ["seven " * 200])
    assert teacher.num_truncated == 1


def test_without_a_compiler_the_error_says_what_it_takes(teacher, monkeypatch):
    monkeypatch.setattr(teacher.unet, "compile", lambda **_: setattr(teacher, "predict", no_compiler))
    with pytest.raises(InstaFlowError, match="cannot be compiled here: no g\\+\\+") as caught:
        Sampling(teacher, num_steps=1, guidance_scale=1.0, compiled_for=2)
    assert "C++ compiler" in caught.value.hint and "compile: false" in caught.value.hint


def no_compiler(*_):
    raise RuntimeError("no g++ found\nand a page of it")


def test_it_pays_to_compile_where_the_work_is_long_and_a_compiler_is_there(teacher, monkeypatch):
    calls = int(sampling.WORTH_COMPILING * torch.get_num_threads() / network_flops(teacher)) + 1
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert pays_to_compile(teacher, calls)
    assert not pays_to_compile(teacher, calls - 2)
    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    assert not pays_to_compile(teacher, calls)


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_network_s_operations_are_counted_without_computing(tmp_path, family):
    """Its convolutions and products alone: those of one 3x3 convolution are known, and all grow with the width."""
    model = load(write_published(tmp_path / family, family))
    flops = network_flops(model)
    first = 2 * 8 * 8 * 3 * 3 * 4 * 16  # the first convolution
    assert flops > 10 * first
    wider = load(write_published(tmp_path / family, family))
    keys = dict(wider.unet.config) | {"block_out_channels": (32,)}
    wider.unet = type(wider.unet).from_config(keys)
    assert 2 < network_flops(wider) / flops < 4
