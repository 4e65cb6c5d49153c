"""The mappings that a stage's settings are made of, and the numbers in them."""

import fractions
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from instaflow.errors import ConfigError

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Steps = Annotated[int, Field(ge=1, le=1000)]
"""Network steps of a sampler: a schedule has 1000 timesteps."""


DIGITS = "digits"
"""The one source that is no place: the miniature's images."""


class Section(BaseModel):
    """A mapping in the file; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Phase(Section):
    """A stretch of training with one batch size and learning rate (InstaFlow trained with 64, then 1024)."""

    samples: PositiveInt
    """Samples that the phase sees."""
    global_batch_size: PositiveInt
    """Samples of one update, over all processes."""
    learning_rate: PositiveFloat
    """AdamW's, after the warm-up."""
    warmup_samples: NonNegativeInt = 0
    """Samples in which the learning rate rises to it from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine from the learning rate to zero at the phase's end."""

    @property
    def updates(self) -> int:
        """Of the network: one a whole batch."""
        return self.samples // self.global_batch_size

    @property
    def seen(self) -> int:
        """The samples in whole batches, which are those that training sees."""
        return self.updates * self.global_batch_size

    @model_validator(mode="after")
    def whole_batches(self) -> "Phase":
        if self.samples < self.global_batch_size:
            raise ValueError(f"samples ({self.samples}) is less than one global_batch_size ({self.global_batch_size})")
        return self


Loss = Literal["l2", "pseudo-huber", "lpips", "lpips-huber"]
PERCEPTUAL_LOSSES = ("lpips", "lpips-huber")
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
"""LPIPS' own networks, with the files of weights that torchvision gives out for them."""


FEATURES = ("inception", "inception-clean-fid", "pixels")
"""What an evaluation of images may measure in, beside a network in a folder."""


class FlowPhase(Phase):
    """A phase of a training on couplings, which has a loss as well (InstaFlow distilled by L2, then by LPIPS)."""

    loss: Loss = "l2"
    """Of velocities or data, or of decoded images."""


class HalvingPhase(Phase):
    """A phase of progressive distillation."""

    num_steps: Steps
    """The student's, half of its teacher's."""

    @property
    def job(self) -> str:
        """What its training is called, and the folder of its checkpoints."""
        return "1-step" if self.num_steps == 1 else f"{self.num_steps}-steps"


class MatchingPhase(Phase):
    """A phase of distribution matching, which may change how much the other terms count (as DMD and DMD2 did)."""

    regression_weight: NonNegativeFloat | None = None
    """By default regression.weight; at 0 nothing is regressed."""
    gan_weight: NonNegativeFloat | None = None
    """By default gan.weight; at 0 the discriminator rests as well."""


class FakeScore(Section):
    """How the score of the generator's own images is kept up to date: a diffusion model trained beside it."""

    updates: PositiveInt = 1
    """Before each update of the generator (DMD 1; DMD2 5, and 10 for Stable Diffusion)."""
    learning_rate_scale: PositiveFloat = 1.0
    """Its learning rate in units of the generator's, at every moment."""


class Regression(Section):
    """DMD's second term: from a coupled noise the generator is to make the coupled image."""

    couplings: str
    """A couple stage of the teacher, or the folder of one."""
    weight: NonNegativeFloat = 0.25
    """Of this term beside the matching."""
    loss: Literal["lpips", "l2"] = "lpips"
    """Of decoded images, or of latents."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Coupled samples for each sample of the matching."""
    matched: bool = False
    """The coupled samples' distribution is matched as well: with a share of 1 they are half of what is matched (DMD on
    LAION)."""

    @property
    def exact_share(self) -> fractions.Fraction:
        """`share` as the fraction that it is written for: 0.3333 is a third."""
        return fractions.Fraction(self.share).limit_denominator(1000)

    def fits(self, samples: int) -> bool:
        """Whether as many samples of the matching come with a whole number of coupled ones, and with some."""
        pairs = samples * self.exact_share
        return pairs >= 1 and pairs.denominator == 1


class Gan(Section):
    """DMD2's third term: a discriminator on the fake score's bottleneck tells noised images from noised real ones."""

    real: str
    """A couple stage, or its folder: its images with their prompts are the real ones, its noise is not used."""
    weight: NonNegativeFloat = 1e-3
    """Of the generator's term."""
    fake_weight: PositiveFloat = 1e-2
    """Of the discriminator's own loss beside the fake score's."""


class Perceptual(Section):
    """How it is measured how different two images look (LPIPS, arXiv 1801.03924), and what that needs."""

    network: Annotated[str, Field(min_length=1)] = "alex"
    """"alex" or "vgg", LPIPS' own; or a teacher stage that trains one, or the folder of such a one."""
    weights: str | None = None
    """The file of torchvision's weights for "alex" or "vgg"; null for where `instaflow weights` finds it."""
    decoder: str | None = None
    """The folder of an AutoencoderTiny that decodes in place of the model's VAE, for its memory and speed."""
    crop: PositiveInt | None = None
    """Decode and compare a square of so many latent cells a side, at a place drawn for each sample; null for all."""

    @model_validator(mode="after")
    def weights_of_its_network(self) -> "Perceptual":
        if self.network not in BACKBONES and self.weights is not None:
            raise ValueError(f"weights go with network: {' or '.join(BACKBONES)}")
        return self


def check_crop(perceptual: Perceptual, side: int, where: str) -> None:
    """Raises ConfigError, naming `where`, if the square that is compared is larger than a latent of this side."""
    if perceptual.crop and perceptual.crop > side:
        raise ConfigError(
            f"Stage '{where}': perceptual.crop is {perceptual.crop}, a latent's side {side}",
            "Choose a smaller one, or null for the whole latent",
        )


def share_of(phase: Phase, micro_batch_size: int | None, processes: int, where: str = "phases") -> int:
    """The samples that one process takes through the network at a time, by default its whole share of a global batch.

    A larger micro_batch_size is cut to the share. Raises ConfigError, naming `where`, if the batch cannot be shared.
    """
    size = phase.global_batch_size
    share = size // processes
    micro = min(micro_batch_size or share, share)
    if micro < 1 or size % (micro * processes):
        count = "one process" if processes == 1 else f"{processes} processes"
        raise ConfigError(
            f"'{where}': global_batch_size is {size}, which {count} with micro_batch_size {max(micro, 1)} cannot share "
            "evenly",
            f"Choose a multiple of {max(micro, 1) * processes}",
        )
    return micro


class PromptSource(Section):
    """The prompts of a file, and which of them are taken."""

    path: Annotated[str, Field(min_length=1)]
    """A file, its form told by its ending: .csv, .tsv, .jsonl, .parquet, .json (COCO's captions), .tar (webdataset, as
    img2dataset writes it), any other for text with a prompt a line. Or many: `{00000..00099}.tar`, a glob, a folder of
    .tar files. A relative path starts at the experiment file; s3://... and all that fsspec knows are read in place."""
    column: str | None = None
    """Where the prompts are, in a table; in a webdataset a key of its .json, by default the .txt, else "caption"."""
    min_length: PositiveInt = 1
    """In characters."""
    max_length: PositiveInt | None = None
    """In characters."""
    score_column: str | None = None
    """Where the scores are that min_score asks about."""
    min_score: float | None = None
    """Prompts that score lower are left out, as with LAION's aesthetic score."""
    deduplicate: bool = False
    """Take each prompt the first time only."""

    @model_validator(mode="after")
    def adds_up(self) -> "PromptSource":
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError("score_column and min_score go together")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length ({self.max_length}) is less than min_length ({self.min_length})")
        return self


def form_of_prompts(value: Any) -> str:
    """Which of its forms `prompts` has; what is none of them is told to be a text."""
    return "list[str]" if isinstance(value, list) else "mapping" if isinstance(value, dict | PromptSource) else "str"


class RealCouplings(Section):
    """Couplings of real images, and how often training sees them in place of the model's own."""

    couplings: str
    """A couple stage that inverts `data`, or the folder of one."""
    share: Annotated[float, Field(ge=0.001, le=0.999)]
    """Of all samples, to a thousandth: the chance of each to come from there."""


class KeepImages(Section):
    """Which records keep their image, and in which format."""

    every: PositiveInt
    """Those whose index is a multiple of it: 1 keeps every image, 100 one in a hundred."""
    format: Literal["webp", "png"] = "webp"
    """WebP is lossy, at quality 90; PNG is not."""


class Keep(Section):
    """What the records of a couple stage hold besides noise, latent and prompt."""

    images: KeepImages | None = None
    """The latent as the model's VAE decodes it, for people to look at."""
    embeddings: bool = False
    """The prompt as the network takes it; no prompt, guidance's other branch, lies once in `no-prompt.npz`."""
    trajectory: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None = None
    """States of the sampler's path: x_t = (1-t) noise + t data, at the times that it visits nearest to these."""

    @model_validator(mode="after")
    def adds_up(self) -> "Keep":
        if not (self.images or self.embeddings or self.trajectory):
            raise ValueError("names nothing to keep; name images, embeddings or trajectory, or leave it out")
        if self.trajectory and sorted(set(self.trajectory)) != self.trajectory:
            raise ValueError(f"trajectory: the times must rise, and {self.trajectory} do not")
        return self


class Preview(Section):
    """When a flow in training samples its moving average, and how much, from the first couplings' noises and prompts.

    A preview calls the network images × num_steps times, twice that under guidance, and decodes `grid` images. Where a
    training sample counts as three calls, the defaults cost a quarter of a percent of one process's work, half a
    percent under guidance. The leading process does it while the others wait: with many, choose a larger `every`.
    """

    every: PositiveInt = 65536
    """Training samples between two previews; the last is at the training's end."""
    images: Annotated[int, Field(ge=2)] = 128
    """So many are sampled and measured."""
    grid: PositiveInt = 12
    """So many of them are seen on the picture."""
    num_steps: Steps = 4
    """Or the stage's own, where they are fewer: a student takes one. Few show best whether the paths are straight."""

    @model_validator(mode="after")
    def grid_is_sampled(self) -> "Preview":
        if self.grid > self.images:
            raise ValueError(f"grid ({self.grid}) is more than the images ({self.images})")
        return self


class EvaluatedModel(Section):
    """A model in the report, sampled with each number of steps."""

    model: str
    """A stage, a folder or a hub name."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average, which a training stage's model/ holds, or the weights of its model-raw/."""
    num_steps: Annotated[list[Steps], Field(min_length=1)]
    """Each is a row of the report."""
    guidance_scale: NonNegativeFloat | None = None
    """By default what the model's folder recommends."""
    guidance_scales: Annotated[list[NonNegativeFloat], Field(min_length=1)] | None = None
    """A sweep in place of one scale: each is a row at every number of steps."""

    @property
    def scales(self) -> list[float | None]:
        """The guidance scales of its rows; None for what the model's folder recommends."""
        return list(self.guidance_scales) if self.guidance_scales else [self.guidance_scale]

    @model_validator(mode="after")
    def rows_differ(self) -> "EvaluatedModel":
        if self.guidance_scale is not None and self.guidance_scales:
            raise ValueError("guidance_scale and guidance_scales: give the one, or the list")
        for key, values in (("num_steps", self.num_steps), ("guidance_scales", self.guidance_scales or [])):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} names one twice")
        return self


class Reference(Section):
    """The images, of a model's moving average, that every model's images of the same noise are compared with."""

    model: str
    """One of the models."""
    num_steps: Steps
    """One of its numbers of steps."""
    guidance_scale: NonNegativeFloat | None = None
    """One of its guidance scales; by default the one that it has or, of a sweep, the one that its folder recommends."""


class Aim(Section):
    """What one of the models is meant to reach; the report tells whether it does. One bound, of three kinds."""

    model: str
    """One of the models."""
    num_steps: Steps = 1
    """One of its numbers of steps."""
    figure: Literal["frechet_distance_real", "frechet_distance_teacher", "prompt_accuracy", "clip_score"]
    """Of a sweep over guidance scales, the best."""
    value: float | None = None
    """The figure itself: a distance at most, a share or a score at least. A published one, say."""
    times_reference: PositiveFloat | None = None
    """The same as a multiple of the reference's figure."""
    better_than: str | None = None
    """Another of the models, at the same number of steps: an ablation, which is to be worse."""
    source: str = ""
    """Where the aim is from, such as "arXiv 2309.06380"."""

    @model_validator(mode="after")
    def one_bound(self) -> "Aim":
        bounds = [self.value, self.times_reference, self.better_than]
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError("an aim has one of value, times_reference and better_than")
        if self.times_reference and self.figure == "frechet_distance_teacher":
            raise ValueError("times_reference: the reference's own frechet_distance_teacher is 0; give value")
        if self.better_than == self.model:
            raise ValueError(f"better_than: '{self.model}' cannot be better than itself")
        return self
