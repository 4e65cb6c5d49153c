"""InstaFlow's own convention: what its released networks are told and answer, and ours made of them and back.

Its pipeline (`code/pipeline_rf.py` of gnobitab/InstaFlow) goes from noise x to data in N steps i = 0, 1, ... of

    x + v(x, 1000 (1 - i/N)) / N,    v: data - noise,

and the sampler of a velocity flow here (see `instaflow.flow.views.VelocityView`) in steps of

    x - 0.999 u(x, 999 (1 - i/N)) / N,    u: noise - data.

So u(x, τ) = -v(x, τ + 1) / 0.999 makes the same of one step, exactly. Of several, timesteps are less than 1 off.
"""

import json
from pathlib import Path
from typing import Any

import torch

from instaflow.errors import ConfigError
from instaflow.files import write_file, write_json
from instaflow.models.export import write_model
from instaflow.models.stacked import StackedUNet
from instaflow.places import RELEASED

SCALE = 0.999
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# {what} in InstaFlow's convention

With `pipeline_rf.py` of [InstaFlow](https://github.com/gnobitab/InstaFlow), or diffusers' `instaflow_one_step`:

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline="instaflow_one_step", safety_checker=None)
image = pipeline("a prompt", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

Any other pipeline misreads the network: its output is data - noise, at timesteps from 1000.
"""


def write_released(model: Any, folder: Path) -> None:
    """Write a velocity flow's TextToImage as InstaFlow's models were released; its network is changed in place.

    Raises ConfigError for a model that InstaFlow's pipeline can't sample.
    """
    settings = model.settings
    if settings.parametrization != "velocity" or isinstance(model.unet, StackedUNet) or model.text_encoder_2:
        raise ConfigError(
            f"'{model.name}' cannot be told in InstaFlow's convention, which is of one U-Net of a Stable Diffusion 1 "
            "or 2 that answers with a velocity",
            "Export it as a folder for diffusers",
        )
    to_released(model.unet)
    write_model(folder, **model.parts, scheduler=model.scheduler, settings=settings)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"_class_name": RELEASED})
    what = "A one-step student" if settings.kind == "student" else "A rectified flow"
    write_file(folder / "README.md", CARD.format(what=what, steps=settings.num_steps, guidance=settings.stock_guidance))


def from_released(unet: Any) -> None:
    """Make a network of InstaFlow's a velocity flow's, in place."""
    shift_time(unet, 1)
    scale_output(unet, -1 / SCALE)


def to_released(unet: Any) -> None:
    """Make a velocity flow's network InstaFlow's, in place."""
    shift_time(unet, -1)
    scale_output(unet, -SCALE)


@torch.no_grad()
def shift_time(unet: Any, by: float) -> None:
    """Make a U-Net take each timestep τ for τ + `by`, in place.

    It sees a timestep as cos(ω τ) and sin(ω τ). Adding to τ turns each such pair by an angle, as its first layer can.
    """
    weight = unet.time_embedding.linear_1.weight
    first, second = weight.double().chunk(2, 1)  # what the layer makes of one half of the features, and of the other
    cos, sin = unet.time_proj(torch.tensor([float(by)])).double().to(weight.device).chunk(2, 1)
    if not unet.config.flip_sin_to_cos:
        cos, sin = sin, -cos
    weight.copy_(torch.cat([first * cos + second * sin, second * cos - first * sin], 1))


@torch.no_grad()
def scale_output(unet: Any, factor: float) -> None:
    """Multiply a U-Net's output by a number, in place, by its last convolution."""
    for parameter in unet.conv_out.parameters():
        parameter.mul_(factor)
