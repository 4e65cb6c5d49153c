"""InstaFlow toolkit: turn a text-to-image diffusion model into a one-step generator."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from instaflow.sections import Dtype
    from instaflow.using.generator import Generator

__version__ = "0.1.0"


def load(
    place: "str | Path",
    *,
    device: str | None = None,
    dtype: "Dtype" = "float32",
    batch_size: int = 64,
    safety_checker: bool = True,
) -> "Generator":
    """A model ready to draw: called with prompts and seeds, it gives images.

    place: a model's folder, a hub name or a .safetensors file, as `instaflow sample` takes it. device: PyTorch's name
    of it; by default this process's GPU, or the CPU. dtype: the networks' precision, "float32", "bfloat16" or
    "float16"; the sampler computes in float32. batch_size: images drawn at a time. safety_checker: whether the one in
    the folder, where there is one, looks at the images and blackens those that it takes for unsafe.

    Raises DataError if there is no such model, ConfigError for a device or a precision that is not known.

        model = instaflow.load("runs/digits/student/model")
        image, other = model("a handwritten seven", seeds=[3, 4])
    """
    from instaflow.using.generator import load as load_generator

    return load_generator(place, device=device, dtype=dtype, batch_size=batch_size, safety_checker=safety_checker)
