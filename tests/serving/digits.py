"""A student and a teacher as the digits experiment has them, untrained."""

from pathlib import Path

import torch

from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.tokenizer import build_tokenizer
from instaflow.models.export import save_model
from instaflow.models.samplers import flow_scheduler
from instaflow.models.settings import ModelSettings


def write_digits(folder: Path) -> list[str]:
    """The folders of a student and a teacher of the digits experiment, untrained."""
    places = []
    student = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}
    for name, settings in (("student", student), ("teacher", {"guidance_scale": 4.0})):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        scheduler = build_scheduler()
        save_model(
            folder / name / "model",
            unet=build_unet(),
            vae=build_autoencoder(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=flow_scheduler("velocity", scheduler) if name == "student" else scheduler,
            settings=ModelSettings(**settings),  # type: ignore[arg-type]
        )
        places.append(str(folder / name / "model"))
    return places
