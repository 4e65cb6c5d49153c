"""Writing a model folder: a plain diffusers pipeline, with instaflow.json and a model card beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from diffusers import ConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from instaflow.files import replace_folder, write_file, write_json
from instaflow.models import stacked
from instaflow.models.settings import ModelSettings, write_settings
from instaflow.places import PIXELS

transformers.utils.logging.disable_progress_bar()

CODE = f"unet/{stacked.__name__}.py"
"""Where stock diffusers looks for a class that model_index.json places in that module."""
STACKED = f"""The network is two U-Nets in series, for which diffusers has no class: the code lies in `{CODE}`
and needs nothing else. diffusers runs it where it is told to trust it, and refuses to load the model otherwise.
ControlNets and adapters are made for one U-Net, and are refused.

"""
"""The model card's words on it."""
OF_PIXELS = """An EDM (arXiv 2206.00364) on pixels in [-1, 1]. diffusers has no pipeline of that name:
ConsistencyModelPipeline is the one that feeds such a network as its scheduler says, with the number of a class. Despite
its name it draws no noise but the first, for the scheduler that lies here draws none. Heun's method, EDM's own sampler,
is not in diffusers.

"""
"""The same on a model of pixels."""
LINEAGE = " Made by, oldest first:\n\n"
"""Where a model card's list of stages begins."""
LOADED_FROM = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
"""What the libraries note about where a part came from."""


def save_model(folder: Path, *, scheduler: Any, settings: ModelSettings, **parts: Any) -> None:
    """Write a pipeline folder that stock diffusers loads; complete or absent, free of machine paths.

    Beside a stacked U-Net lies the code of its class, where `trust_remote_code=True` finds it.
    The parts are unet, vae, text_encoder and tokenizer; with text_encoder_2, tokenizer_2 and
    force_zeros_for_empty_prompt it is a StableDiffusionXLPipeline, and with the unet alone a model of pixels.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(temporary, scheduler=scheduler, settings=settings, **parts)
    replace_folder(temporary, folder)


def write_model(folder: Path, *, scheduler: Any, settings: ModelSettings, **parts: Any) -> None:
    """Write what `save_model` does, file by file."""
    pipeline: Any
    if "vae" not in parts:
        pipeline = ConsistencyModelPipeline(**parts, scheduler=scheduler)
    elif "text_encoder_2" in parts:
        pipeline = StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for name in ("tokenizer", "tokenizer_2"):
        backend = getattr(parts.get(name), "backend_tokenizer", None)
        if backend is not None:  # it would write down how it was last used
            backend.no_padding()
            backend.no_truncation()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and LOADED_FROM & content.keys():
            write_json(file, {key: value for key, value in content.items() if key not in LOADED_FROM})
    if is_stacked(pipeline):
        shutil.copyfile(stacked.__file__, folder / CODE)
    write_settings(folder, settings)
    write_file(folder / "README.md", model_card(settings, pipeline))


def model_card(settings: ModelSettings, pipeline: Any) -> str:
    """The folder's README: what the model is and the stock lines that sample it."""
    steps, name, code = settings.num_steps, type(pipeline).__name__, is_stacked(pipeline)
    of_pixels = name == PIXELS
    what = {
        "teacher": "A diffusion model: the teacher",
        "flow": "A rectified flow",
        "student": f"A {'one' if steps == 1 else steps}-step {'image' if of_pixels else 'text-to-image'} generator",
    }[settings.kind]
    weights = "exponential moving average" if settings.weights == "ema" else "raw, as the optimizer left them"
    lines = [f"- {entry['stage']} ({entry['kind']}): {entry['summary']}" for entry in settings.lineage]
    if of_pixels:
        imports, place = "", '"."'
        arguments = ["class_labels=[0]"] if pipeline.unet.config.num_class_embeds else []
        arguments.append(f"num_inference_steps={steps}")
    else:
        imports = "import transformers\n"
        place = '"."' if name == "StableDiffusionXLPipeline" else '".", safety_checker=None'
        place += ", trust_remote_code=True" if code else ""
        arguments = ['"a prompt"', f"num_inference_steps={steps}", f"guidance_scale={settings.stock_guidance}"]
    return f"""---
library_name: diffusers
pipeline_tag: {"unconditional-image-generation" if of_pixels else "text-to-image"}
---
# {what}

```python
{imports}from diffusers import {name}

pipeline = {name}.from_pretrained({place})
image = pipeline({", ".join(arguments)}).images[0]
```

{STACKED if code else ""}{OF_PIXELS if of_pixels else ""}Weights: {weights}.
Parametrization: {settings.parametrization}.{LINEAGE}{chr(10).join(lines)}
"""


def is_stacked(pipeline: Any) -> bool:
    return isinstance(pipeline.unet, stacked.StackedUNet)
