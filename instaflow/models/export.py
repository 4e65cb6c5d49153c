"""Writing a model folder: a plain diffusers pipeline, with instaflow.json and a model card beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from diffusers import StableDiffusionPipeline

from instaflow.files import replace_folder, write_file, write_json
from instaflow.models.settings import ModelSettings, write_settings

transformers.utils.logging.disable_progress_bar()

LOADED_FROM = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
"""What the libraries note about where a part came from."""


def save_model(
    folder: Path, *, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, settings: ModelSettings
) -> None:
    """Write a StableDiffusionPipeline folder that stock diffusers loads; complete or absent, free of machine paths."""
    pipeline: Any = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it would write down how it was last used
        backend.no_padding()
        backend.no_truncation()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    for file in temporary.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and LOADED_FROM & content.keys():
            write_json(file, {key: value for key, value in content.items() if key not in LOADED_FROM})
    write_settings(temporary, settings)
    write_file(temporary / "README.md", model_card(settings))
    replace_folder(temporary, folder)


def model_card(settings: ModelSettings) -> str:
    """The folder's README: what the model is and the stock lines that sample it."""
    what = {
        "teacher": "A diffusion model: the teacher",
        "flow": "A rectified flow",
        "student": "A one-step text-to-image generator",
    }[settings.kind]
    guidance = settings.guidance_scale if settings.guidance_scale > 1 else 1.0
    lines = [f"- {entry['stage']} ({entry['kind']}): {entry['summary']}" for entry in settings.lineage]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# {what}

```python
import transformers
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(".", safety_checker=None)
image = pipeline("a prompt", num_inference_steps={settings.num_steps}, guidance_scale={guidance}).images[0]
```

Weights: {"exponential moving average" if settings.weights == "ema" else "raw, as the optimizer left them"}.
Parametrization: {settings.parametrization}. Made by, oldest first:

{chr(10).join(lines)}
"""
