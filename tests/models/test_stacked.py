"""Two U-Nets in series: what they compute, how they begin, and who can load them."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.export import save_model
from instaflow.models.sampling import network_flops
from instaflow.models.settings import ModelSettings
from instaflow.models.stacked import StackedUNet, stack
from instaflow.models.text_to_image import negate_output
from instaflow.models.tiny import WIDTH, tiny_xl_parts
from instaflow.models.tiny import tiny_unet as build_unet
from tests.couplings.made import contents
from tests.models.made import build_parts, load, noise, teacher_scheduler
from tests.models.test_export import STOCK

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults
PROMPTS = ["the digit 7", "an odd digit"]
KINDS = {
    "attention last": build_unet,
    "two levels": lambda: build_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=2,
    ),
    "no attention last": lambda: build_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(WIDTH, 2 * WIDTH),
    ),
    "xl": lambda: tiny_xl_parts(build_tokenizer())["unet"],
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def arguments(unet):
    """Noise, timesteps, and text as the network wants it, random."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 2 * WIDTH, generator=generator), "time_ids": torch.full((2, 6), 16.0)}
    text = {"encoder_hidden_states": hidden}
    return (noise(), torch.tensor([999, 500])), text | (
        {"added_cond_kwargs": added} if unet.config.addition_embed_type else {}
    )


def two_in_series(kind):
    """Two U-Nets of different random weights, and both in one StackedUNet."""
    torch.manual_seed(0)
    first, second = KINDS[kind](), KINDS[kind]()
    torch.manual_seed(1)
    second.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in first.state_dict().items()})
    both = StackedUNet.from_config(first.config)
    weights = second.state_dict() | {f"first.{name}": value for name, value in first.state_dict().items()}
    both.load_state_dict({name: weights[name] for name in both.state_dict()})
    return first.eval(), second.eval(), both.eval()


def write_stacked(folder, parts=None, **settings):
    """A student's folder with two U-Nets of different weights."""
    parts = parts or build_parts() | {"unet": two_in_series("attention last")[2]}
    how = {"kind": "student", "parametrization": "epsilon", "num_steps": 1, "guidance_scale": 1.0} | settings
    save_model(folder, **parts, scheduler=teacher_scheduler(), settings=ModelSettings(**how))
    return folder


def test_two_of_stable_diffusions_have_1_7_billion_parameters():
    with torch.device("meta"):
        one, two = UNet2DConditionModel(**SD15), StackedUNet(**SD15)
    assert count(one) == 859_520_964
    assert count(two) == 1_719_017_924
    left_out = count(one.conv_in) + count(one.conv_norm_out) + count(one.conv_out)
    assert count(two) == 2 * count(one) - left_out
    assert left_out == 11_840 + 640 + 11_524


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_seconds_blocks_take_what_the_firsts_last_block_makes(kind):
    first, second, both = two_in_series(kind)
    (x, timestep), text = arguments(first)
    made = []
    first.up_blocks[-1].register_forward_hook(lambda module, inputs, output: made.append(output))
    first(x, timestep, **text)
    second.conv_in.register_forward_hook(lambda module, inputs, output: made[0])
    expected = second(x, timestep, **text).sample
    assert torch.equal(both(x, timestep, **text).sample, expected)
    assert torch.equal(both(x, timestep, **text, return_dict=False)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_copies_begin_as_the_one(kind):
    torch.manual_seed(0)
    one = KINDS[kind]().eval()
    two = stack(one)
    places, text = arguments(one)
    assert torch.equal(two(*places, **text).sample, one(*places, **text).sample)
    negate_output(two)
    assert torch.equal(two(*places, **text).sample, -one(*places, **text).sample)
    memory = [parameter.data_ptr() for network in (one, two) for parameter in network.parameters()]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_both_away_from_each_other(kind):
    torch.manual_seed(0)
    two = stack(KINDS[kind]()).requires_grad_(True)
    before = copy.deepcopy(two.state_dict())
    places, text = arguments(two)
    adamw = torch.optim.AdamW(two.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        adamw.zero_grad()
        two(*places, **text).sample.square().mean().backward()
        adamw.step()
    weights = dict(two.named_parameters())
    still = [name for name, value in weights.items() if torch.equal(value, before[name])]
    assert [name for name in still if not name.endswith(("to_k.weight", "to_q.weight"))] == []
    alike = [
        name
        for name in weights
        if name.startswith("first.") and torch.equal(weights[name], weights.get(name[6:], before[name]))
    ]
    assert alike == []


def test_gradient_checkpointing_reaches_both_and_changes_no_gradient():
    _, _, both = two_in_series("two levels")
    places, text = arguments(both)
    gradients, calls = [], []
    for wanted in (False, True):
        both.zero_grad()
        if wanted:
            both.enable_gradient_checkpointing()
            both.train()
        for network in (both, both.first):
            network.mid_block.resnets[1].register_forward_pre_hook(lambda module, _: calls.append(module))
        both(*places, **text).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in both.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    for network in (both, both.first):  # one hook, then two, on the way there and on the way back
        assert calls.count(network.mid_block.resnets[1]) == 1 + 2 * 2


def test_a_controlnets_residuals_are_refused():
    _, _, both = two_in_series("attention last")
    places, text = arguments(both)
    with pytest.raises(TypeError, match="mid_block_additional_residual"):
        both(*places, **text, mid_block_additional_residual=noise())


@pytest.mark.parametrize("family", ["sd", "xl"])
@torch.no_grad()
def test_a_saved_model_loads_with_the_same_output(tmp_path, family):
    if family == "xl":
        parts = tiny_xl_parts(build_tokenizer()) | {"unet": two_in_series("xl")[2]}
    else:
        parts = build_parts() | {"unet": two_in_series("attention last")[2]}
    model = load(write_stacked(tmp_path / "model", parts))
    assert type(model.unet) is StackedUNet
    places, text = arguments(model.unet)
    assert torch.equal(model.unet(*places, **text).sample, parts["unet"](*places, **text).sample)
    again = tmp_path / "again"
    save_model(again, **model.parts, scheduler=model.scheduler, settings=model.settings)
    assert contents(again) == contents(tmp_path / "model")
    assert model.sample(noise(), PROMPTS, num_steps=2, guidance_scale=3.0).isfinite().all()
    assert load(again, torch.bfloat16).unet.first.conv_in.weight.dtype == torch.bfloat16


def test_loading_runs_no_code_of_the_folder(tmp_path):
    folder = write_stacked(tmp_path / "model")
    (code,) = folder.glob("unet/*.py")
    code.write_text("raise SystemExit('this was run')")
    assert type(load(folder).unet) is StackedUNet


CARD = """
lines, prompts = {lines!r}, {prompts!r}
refused = ""
try:
    exec(lines.replace(", trust_remote_code=True", ""))
except ValueError as error:
    refused = str(error)
assert "Pass `trust_remote_code=True`" in refused, refused
exec(lines)
assert image.size == (16, 16)
import numpy, torch
start = torch.from_numpy(numpy.load("../noise.npy"))
how = dict(num_inference_steps=2, guidance_scale=3.0, latents=start, output_type="latent")
numpy.save("../latents.npy", pipeline(prompts, **how).images.numpy())
"""


@pytest.mark.slow
def test_stock_diffusers_alone_runs_the_cards_lines_and_says_what_it_wants(tmp_path):
    folder = write_stacked(tmp_path / "model")
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    np.save(tmp_path / "noise.npy", noise().numpy())
    script = STOCK.partition("import json")[0] + CARD.format(lines=lines, prompts=PROMPTS)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = load(folder).sample(noise(), PROMPTS, num_steps=2, guidance_scale=3.0)
    np.testing.assert_allclose(ours.numpy(), np.load(tmp_path / "latents.npy"), rtol=1e-5, atol=1e-5)


def test_the_index_names_the_file_that_comes_along(tmp_path):
    folder = write_stacked(tmp_path / "model")
    module, name = json.loads((folder / "model_index.json").read_text())["unet"]
    assert name == "StackedUNet" and (folder / "unet" / f"{module}.py").is_file()
    plain = write_stacked(tmp_path / "plain", build_parts())
    assert not list(plain.rglob("*.py")) and "trust_remote_code" not in (plain / "README.md").read_text()


def test_its_operations_are_counted(tmp_path):
    one = load(write_stacked(tmp_path / "one", build_parts()))
    two = load(write_stacked(tmp_path / "two"))
    ends = 2 * 9 * 4 * WIDTH * 8 * 8  # multiplications and additions of a 3x3 convolution, 4 channels at one end
    assert network_flops(two) == 2 * network_flops(one) - 2 * ends
