"""Previews of a flow in training: what its moving average draws, beside the coupled images that it is to draw."""

from copy import copy, deepcopy

import torch
from PIL import Image
from torch import Tensor

from instaflow.couplings.contact_sheet import Pair, contact_sheet
from instaflow.couplings.loader import Couplings
from instaflow.evaluation.frechet import frechet_distance
from instaflow.evaluation.latents import features, rms_distance
from instaflow.evaluation.wording import number, steps
from instaflow.files import write_file
from instaflow.models.model import Model
from instaflow.models.samplers import flow_scheduler
from instaflow.models.sampling import Sampling
from instaflow.models.settings import ModelSettings
from instaflow.rundir import StageFolder
from instaflow.using.metadata import encoded

BATCH = 16


class Previews:
    """Samples weights as the folder that they will be exported to would, from the first couplings' noises and prompts.

    Which couplings these are follows from the seed alone. Memory: a second U-Net in float32, on the device while it
    samples and on the CPU otherwise. The network computes in the precision that it trains in.
    """

    def __init__(self, stage: StageFolder, model: Model, couplings: Couplings, settings: ModelSettings) -> None:
        preview = stage.stage.preview
        self.stage, self.device = stage, model.device
        self.couplings = couplings.batch(0, max(2, min(preview.images, len(couplings))))  # one alone counts twice
        self.data = torch.from_numpy(self.couplings.latent)
        self.images = model.pictures(self.data[: preview.grid])
        self.num_steps = min(preview.num_steps, settings.num_steps)
        self.model = copy(model)
        self.model.unet = deepcopy(model.unet).cpu().requires_grad_(False).eval()
        self.model.scheduler = flow_scheduler(settings.parametrization, model.scheduler)
        self.model.settings = settings

    def __call__(self, weights: dict[str, Tensor], samples_seen: int) -> dict[str, float | None]:
        """Keep the picture of `weights`, say how near they are, and return it in figures.

        preview_distance: the root mean square difference of a sampled latent and the coupled one of the same noise and
        prompt. preview_frechet: the Fréchet distance of the two sets, in latents averaged over 4×4 cells; as the sets
        share noises and prompts, it is 0 where each latent is met. Both are None where a latent is not finite.
        """
        latents = self.sample(weights)
        figures: dict[str, float | None] = {"preview_distance": None, "preview_frechet": None}
        if latents.isfinite().all():
            figures["preview_distance"] = rms_distance(latents, self.data)
            figures["preview_frechet"] = frechet_distance(features(latents), features(self.data))
        distance, frechet = (number(value) for value in figures.values())
        found = f"distance {distance}, Fréchet distance {frechet} over {len(latents):,} couplings"
        title = f"{self.stage.name} at {samples_seen:,} samples"
        file = self.stage.folder / "previews" / f"{samples_seen:09d}.png"
        file.parent.mkdir(exist_ok=True)
        write_file(file, encoded(self.picture(latents, title, found), file))
        print(f"{title}, {steps(self.num_steps)}: {found}; {file}", flush=True)
        return figures

    def picture(self, latents: Tensor, title: str, found: str) -> Image.Image:
        """The first couplings' images, each beside the one that was sampled."""
        drawn = self.model.pictures(latents[: len(self.images)])
        rows = zip(self.couplings.indices, self.couplings.prompts, self.images, drawn, strict=False)
        pairs = [
            Pair(int(index), prompt, left.cpu().numpy(), right.cpu().numpy()) for index, prompt, left, right in rows
        ]
        seen = (
            f"Left the coupling's image, right what the averaged weights make of its noise in {steps(self.num_steps)}"
        )
        return contact_sheet(title, f"{seen}: {found}", pairs)

    def sample(self, weights: dict[str, Tensor]) -> Tensor:
        """The latents [N, C, H, W] of the couplings' noises and prompts, float32, on the CPU."""
        model, noise, prompts = self.model, torch.from_numpy(self.couplings.noise), self.couplings.prompts
        model.unet.load_state_dict({name.removeprefix("unet."): value for name, value in weights.items()})
        model.unet.to(self.device)
        half = self.stage.stage.mixed_precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            sampling = Sampling(model, num_steps=self.num_steps, guidance_scale=model.settings.guidance_scale)
            parts = [
                sampling(noise[start : start + BATCH], prompts[start : start + BATCH])
                for start in range(0, len(noise), BATCH)
            ]
        model.unet.cpu()
        return torch.cat(parts).cpu()
