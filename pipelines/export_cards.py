"""What the model cards of exported forms say: the lines of Python that draw by each, and what to know of guidance."""

from pathlib import Path

from instaflow.files import write_file
from instaflow.models.model import Model
from instaflow.models.settings import ModelSettings
from instaflow.places import is_hub_name

IN_ONE_STEP = """import numpy
from onnxruntime import InferenceSession
from PIL import Image
from transformers import AutoTokenizer


def run(part, **inputs):
    return InferenceSession(f"{{part}}/model.onnx").run(None, inputs)[0]


tokenizer = AutoTokenizer.from_pretrained("tokenizer")
words = tokenizer("a prompt", padding="max_length", truncation=True, return_tensors="np")
noise = numpy.random.default_rng(0).standard_normal({shape}, "float32")
velocity = run(
    "unet",
    sample=noise,
    timestep=numpy.array([999]),
    encoder_hidden_states=run("text_encoder", input_ids=words.input_ids.astype("int32")),
)
pixels = run("vae_decoder", latent_sample=(noise - {slope} * velocity) / {factor})
image = Image.fromarray(((pixels[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype("uint8"))"""
"""A card's lines that draw an image from a velocity flow's graphs by onnxruntime alone."""


def unlocked(settings: ModelSettings) -> list[str]:
    """What is to be said of a model that guidance would ruin, in a form that does not keep it off."""
    if settings.kind == "teacher" or settings.guidance_scale > 1:
        return []
    return ["Guidance is trained in: call it with guidance_scale=1.0. The default of 7.5 ruins its images."]


def teacher_loaded(model: Model, place: str) -> str:
    """A card's lines that load the teacher of a difference to it, by its name on the hub if `place` is one."""
    kind = "StableDiffusionXLPipeline" if "text_encoder_2" in model.parts else "StableDiffusionPipeline"
    teacher = place if is_hub_name(place) else "TEACHER"
    return f"""from diffusers import {kind}, {type(model.scheduler).__name__}

pipeline = {kind}.from_pretrained("{teacher}")"""


def sampled(model: Model) -> str:
    """A card's lines that draw an image by the teacher's pipeline, once it is the model's."""
    scheduler = f'{type(model.scheduler).__name__}.from_pretrained(".", subfolder="scheduler")'
    return f"pipeline.scheduler = {scheduler}\n{drawn(model.settings)}"


def drawn(settings: ModelSettings, sizes: str = "") -> str:
    """A card's line that draws an image."""
    sampled = f"num_inference_steps={settings.num_steps}, guidance_scale={settings.stock_guidance}"
    return f'image = pipeline("a prompt", {sizes}{sampled}).images[0]'


def write_card(folder: Path, title: str, code: str) -> None:
    """A model card's beginning, which `describe` completes."""
    head = "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n"
    write_file(folder / "README.md", f"{head}# {title}\n\n```python\n{code}\n```\n")
