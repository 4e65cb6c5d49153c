"""The way from noise to image as a film: a frame a step, models side by side from the same noise."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import LCMScheduler
from PIL import Image
from torch import Tensor

from instaflow.errors import ConfigError
from instaflow.plurals import counted
from instaflow.using.generator import Generator
from instaflow.using.metadata import About
from instaflow.using.sheet import sheet

FRAME, LAST = 150, 2000  # milliseconds


@dataclass(frozen=True)
class Way:
    """The steps of one model on the way from N noises to images.

    states and goals: S + 1 lists of N images. A state is where the path is; its goal, where its tangent leads: the data
    that the network foretells there, z_t + (1 - t) v. On a straight path every goal is the image that comes out.
    """

    label: str
    states: list[list[Image.Image]]
    goals: list[list[Image.Image]]


def way_of(model: Generator, prompts: list[str], noise: Tensor, *, label: str, num_steps: int, scale: float) -> Way:
    """Euler's path of the model's flow, decoded. Raises ConfigError for a sampler that leaves the path."""
    if isinstance(model.model.scheduler, LCMScheduler) and num_steps > 1:
        raise ConfigError(
            f"'{model.model.name}' draws noise between its steps: there is no path to be shown",
            "Leave it out, or show it with --num-steps 1",
        )
    path = model.model.trajectory(noise, prompts, num_steps=num_steps, guidance_scale=scale)
    left = (path.times[-1] - path.times[:-1]).to(path.states).view(-1, 1, 1, 1, 1)
    goals = torch.cat([path.states[:-1] + left * path.velocities, path.states[-1:]])
    return Way(label, [model.decode(state) for state in path.states], [model.decode(goal) for goal in goals])


def frames(ways: Sequence[Way], prompts: list[str]) -> list[Image.Image]:
    """A frame before the first step and one after each; a model that has arrived waits for the others.

    Each has a row a prompt, and in it for each model where it is and where that leads.
    """
    made = []
    for step in range(max(len(way.states) for way in ways)):
        images, captions = [], []
        for row, prompt in enumerate(prompts):
            for way in ways:
                place = min(step, len(way.states) - 1)
                images += [way.states[place][row], way.goals[place][row]]
                captions += [
                    f"{way.label}, {place} of {counted(len(way.states) - 1, 'step')}: {prompt}",
                    "where it leads",
                ]
        made.append(sheet(images, columns=2 * len(ways), captions=captions))
    return made


def film(pictures: Sequence[Image.Image], kind: str, about: About) -> bytes:
    """An animation that repeats for ever and rests at its end; kind: "GIF", "WEBP", or "PNG", which tells of itself."""
    content = io.BytesIO()
    times = [FRAME] * (len(pictures) - 1) + [LAST]
    told = {"pnginfo": about.chunk()} if kind == "PNG" else {}
    pictures[0].save(content, kind, save_all=True, append_images=list(pictures[1:]), duration=times, loop=0, **told)
    return content.getvalue()
