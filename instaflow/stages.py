"""What each kind of stage takes: the schema of an experiment file.

Keys mean one thing everywhere. `model` is what is sampled, `init` the weights that training starts from, `couplings`
a couple stage. Each takes a stage's name, a folder, or (for models) a hub name or a .safetensors file.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from instaflow.prompt_files import is_coco
from instaflow.sections import (
    BACKBONES,
    FEATURES,
    PERCEPTUAL_LOSSES,
    Aim,
    Dtype,
    EvaluatedModel,
    FlowPhase,
    Fraction,
    Keep,
    NonNegativeFloat,
    NonNegativeInt,
    Perceptual,
    Phase,
    Preview,
    PromptSource,
    RealCouplings,
    Reference,
    Section,
    Steps,
    form_of_prompts,
)

Parametrization = Literal["velocity", "epsilon", "rectified-diffusion"]
TimeDensity = Literal["uniform", "u-shaped", "logit-normal"]
PromptsFrom = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Field(min_length=1), Tag("list[str]")]
    | Annotated[PromptSource, Tag("mapping")],
    Discriminator(form_of_prompts),
]
"""A list of prompts, the path of a file of them (`PromptSource.path`), or a path with its column and filters."""
DigitsForm = Literal["digits", "digits-grid"]
"""One handwritten digit an image, or four in a square."""


ImageForm = Literal["coco2017-5k", "coco2014-30k", "imagenet64-50k"]
"""Published protocols, on images and captions of one's own disk."""
FOR_IMAGES = ("captions", "captions_seed", "real", "features", "clip", "clip_prefix")
"""An evaluate stage's keys that go with them alone."""
NUM_SAMPLES = {"digits": 2000, "digits-grid": 2000, "coco2017-5k": 5000, "coco2014-30k": 30000, "imagenet64-50k": 50000}


class Stage(Section):
    """What every stage has."""

    parent_keys: ClassVar[dict[str, str]] = {}
    """The keys that name another stage, and what it must give: "model", "couplings" or "perceptual network"."""
    gives: ClassVar[str] = ""
    free_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that may change between an interruption and its resumption: they do not change the result."""
    remade: ClassVar[bool] = False
    """Whether it is made anew where its settings have changed, and not refused: what it costs is kept elsewhere."""

    def parents(self) -> dict[str, str]:
        """Each place that names another stage, a folder or a hub model, with the name found there."""
        return {key: getattr(self, key) for key in self.parent_keys}

    def serves(self, wanted: str) -> bool:
        """Whether it gives what another stage wants of it."""
        return self.gives == wanted

    def files(self) -> dict[str, str]:
        """Each place that names a file or folder whose content decides the result, with the path found there."""
        return {}

    def without_use(self) -> set[str]:
        """Keys that say nothing beside the others' values, and stand at their defaults."""
        return set()

    def packages(self) -> dict[str, str]:
        """What the settings need that only an extra installs: the package, and the setting that asks for it."""
        return {}

    def identity(self) -> dict[str, Any]:
        """The settings that decide this stage's result."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.free_keys}


class TrainingStage(Stage):
    """What every stage has that trains a network."""

    gives: ClassVar[str] = "model"
    free_keys: ClassVar[frozenset[str]] = frozenset(
        {"checkpoint_every", "compile", "gradient_checkpointing", "keep_checkpoint_every", "keep_checkpoints"}
        | {"loader_workers", "micro_batch_size", "offload_optimizer", "trackers", "zero_stage"}
    )

    phases: Annotated[Sequence[Phase], Field(min_length=1)]
    """Stretches of training, one after the other, each with its batch size and learning rate."""
    micro_batch_size: PositiveInt | None = None
    """Samples that one process takes through the network at a time; by default its whole share of a global batch."""
    ema_decay: Fraction = 0.9999
    """Of the weights' moving average, which is the model that the stage gives; a step."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """8 bits hold AdamW's moments in a quarter of the memory (block-wise, by torchao, which is an extra to install)."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's squared gradients; a short training wants a shorter memory."""
    gradient_clipping: PositiveFloat = 1.0
    """The largest norm of a gradient; a longer one is cut to it."""
    mixed_precision: Literal["bfloat16"] | None = None
    """The precision that the network computes in while it trains, by default float32 as its weights always are."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is sharded over the processes: nothing, AdamW's state and the average (1), gradients too (2), weights too
    (3, which is not for method dmd). It saves memory and changes no result beyond rounding."""
    offload_optimizer: bool = False
    """Keep AdamW's state and the average in the CPU's memory and step there: less of a GPU's memory, more time."""
    checkpoint_every: PositiveInt = 65536
    """Samples between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """So many of the last are kept."""
    keep_checkpoint_every: PositiveInt | None = None
    """Beside them, the first at or past each multiple of so many samples is kept for good."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]  # noqa: RUF012  (pydantic copies it)
    """Where the figures of stats.jsonl go besides: RUN/STAGE/tensorboard, or Weights & Biases (an extra to install)."""

    def packages(self) -> dict[str, str]:
        asked = {"wandb": "trackers: wandb"} if "wandb" in self.trackers else {}
        return asked | ({"torchao": "optimizer: adamw-8bit"} if self.optimizer == "adamw-8bit" else {})

    @model_validator(mode="after")
    def state_has_one_form(self) -> "TrainingStage":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer goes with zero_stage 1, 2 or 3; on one process too, choose 1")
        if self.optimizer == "adamw-8bit" and self.zero_stage:
            raise ValueError("optimizer: adamw-8bit goes with zero_stage 0: such moments can't be sharded")
        return self


class TeacherStage(TrainingStage):
    """Trains the miniature teacher: an autoencoder, then text encoder and U-Net together; and a perceptual network."""

    kind: Literal["teacher"]
    method: Literal["latent"] = "latent"
    data: DigitsForm
    """The images and captions, made from scikit-learn's digits: one an image, or four in a square."""
    autoencoder_phases: Annotated[list[Phase], Field(min_length=1)]
    """Of the autoencoder, which is trained first."""
    text_phases: Annotated[list[Phase], Field(min_length=1)] | None = None
    """Of the text encoder alone, before it and the U-Net train together: it learns what captions say, as Stable
    Diffusion's had before its U-Net began; null for none."""
    perceptual_phases: Annotated[list[Phase], Field(min_length=1)] | None = None
    """Of a small classifier whose features later stages can measure by (perceptual: {network: ...}); null for none."""
    caption_dropout: Fraction = 0.1
    """The share of captions left empty, so that there is something to guide away from."""
    num_steps: Steps = 25
    """The default that the model folder carries for sampling."""
    guidance_scale: NonNegativeFloat
    """With `num_steps`, the default that the model folder carries for sampling."""

    def serves(self, wanted: str) -> bool:
        return super().serves(wanted) or (wanted == "perceptual network" and self.perceptual_phases is not None)


class EdmTeacherStage(TrainingStage):
    """Trains a small EDM on the digits' pixels (Karras et al. 2022, arXiv 2206.00364), sampled without guidance."""

    kind: Literal["teacher"]
    method: Literal["edm"]
    data: Literal["digits"]
    """The images and their classes."""
    classes: bool = True
    """Tell the network which digit it draws: prompts are then "0" to "9", or "zero" to "nine". Else they are empty."""
    num_steps: Steps = 18
    """The default that the model folder carries for sampling."""


class CoupleStage(Stage):
    """Writes (noise, latent) couplings of a model into webdataset shards.

    With `prompts` it draws the noise and samples; with `data` it takes real images and follows the flow back to noise.
    """

    parent_keys: ClassVar[dict[str, str]] = {"model": "model"}
    gives: ClassVar[str] = "couplings"
    free_keys: ClassVar[frozenset[str]] = frozenset({"prompts", "data", "output"})  # these count by content, not place

    kind: Literal["couple"]
    model: str
    """What is sampled, or inverted: a stage, a folder, a hub name or a .safetensors file."""
    prompts: PromptsFrom | None = None
    """What to draw: a list, a file, or a mapping that says how a file is read and what is left out."""
    data: Annotated[str, Field(min_length=1)] | None = None
    """Real images with captions, in place of prompts: "digits", or img2dataset's layout, as .tar files (`{00..99}.tar`,
    a glob, a folder of them, s3://...) or as a folder of images, each with its .txt or .json beside it. The first
    `count` of them are encoded and inverted by Heun's method, which calls the network twice a step."""
    count: PositiveInt
    """Couplings in all; prompts are gone through as often as it takes, each time with other noise."""
    records_per_shard: PositiveInt = 1024
    """Couplings in one .tar file."""
    batch_size: PositiveInt = 16
    """Couplings made at a time. It changes no noise, and latents only by rounding."""
    sampler: Literal["dpm-solver++", "ddim", "pndm", "heun", "unipc", "euler"] | None = None
    """A diffusion teacher's, "dpm-solver++" by default, an EDM's "heun"; a flow knows none but "euler". Each is
    deterministic."""
    num_steps: Steps = 25
    """Steps of the sampler; each calls the network once, but Heun's twice, save the last, and PNDM's first twice."""
    guidance_scale: NonNegativeFloat
    """Classifier-free guidance; 1 or less: none."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """Which of the teacher's timesteps a sampler visits, "trailing" by default; a velocity flow has no such choice."""
    dtype: Dtype = "float32"
    """The network's precision while it samples; couplings are stored in float16."""
    compile: bool | None = None
    """Compile the network (torch.compile). By default on a CPU where the work ahead is worth it; never on a GPU."""
    keep: Keep | None = None
    """What records hold besides noise, latent and prompt; null for nothing."""
    output: str | None = None
    """Where the shards' tars go, by default into the stage's folder: any URL that fsspec writes to, such as
    s3://bucket/pairs or sftp://host/pairs. Credentials and endpoints are fsspec's to know, by its variables
    (FSSPEC_S3_ENDPOINT_URL...), its files in ~/.config/fsspec, or what the store's own package looks at."""

    @field_validator("output")
    @classmethod
    def one_place(cls, output: str | None) -> str | None:
        if output is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^:].*", output):
            raise ValueError(f"{output!r} is no URL; write s3://bucket/folder, or file:///folder for one that is here")
        if output is not None and output.startswith("memory://"):
            raise ValueError(
                f"{output!r} ends with the process that writes there; write s3://bucket/folder, or file:///folder"
            )
        if output is not None and output.startswith("file://") and not output.startswith("file:///"):
            raise ValueError(f"{output!r} is a relative path to some commands and none to others; write file:///folder")
        if output is not None and "::" in output:
            raise ValueError(f"{output!r} is a chain of URLs, which can't be written to")
        if output is not None and re.match(r"[^/]+//[^/@]*:[^/@]*@", output):
            raise ValueError("a password does not belong here; give it to fsspec, say as FSSPEC_FTP_PASSWORD")
        return output

    @field_validator("sampler", mode="before")
    @classmethod
    def deterministic(cls, sampler: Any) -> Any:
        """Refuse a stochastic sampler, by whatever name it goes elsewhere, with the reason."""
        letters = re.sub("[^a-z]", "", str(sampler).lower())
        if re.search("ancestral|eulera|dpma|sde|lcm|tcd|ddpm|ddimeta|turbo", letters):
            raise ValueError(
                f"{sampler!r} draws new noise at each step, and a coupling must follow from its own noise alone; "
                "choose dpm-solver++, ddim, pndm, heun or unipc"
            )
        return sampler

    @model_validator(mode="after")
    def prompts_or_data(self) -> "CoupleStage":
        if (self.prompts is None) == (self.data is None):
            raise ValueError("give either prompts, to sample from noise, or data, to invert")
        idle = [key for key in ("sampler", "timestep_spacing", "compile", "keep") if getattr(self, key)]
        if self.data is not None and idle:
            raise ValueError(f"{idle[0]} goes with prompts: an inversion of data knows none")
        return self

    @model_validator(mode="after")
    def whole_strides(self) -> "CoupleStage":
        if self.sampler in ("ddim", "pndm") and self.timestep_spacing != "leading":
            if self.timestep_spacing == "linspace":
                raise ValueError(f"timestep_spacing: {self.sampler} goes in equal strides, which linspace has not")
            if 1000 % self.num_steps:
                raise ValueError(
                    f"num_steps: {self.sampler} goes in strides of 1000 // {self.num_steps} timesteps and would stop "
                    "short of the data; choose a divisor of 1000, such as 25, 40 or 50, or another sampler"
                )
        return self


class NetworkStage(TrainingStage):
    """What every stage has that goes on training a model's network."""

    parent_keys: ClassVar[dict[str, str]] = {"init": "model"}

    init: str
    """The weights that training starts from: a stage, a folder, a hub name or a .safetensors file."""
    gradient_checkpointing: bool = False
    """Compute a block's activations once more on the way back, in place of keeping them: less memory, more time."""
    loader_workers: NonNegativeInt = 4
    """Threads that read the next shards while a process trains; with 0 a shard is read when its first record is due."""
    compile: bool = False
    """Compile the network (torch.compile): minutes for each micro batch size, and on a CPU with a C++ compiler."""

    @model_validator(mode="after")
    def whole_graph(self) -> "NetworkStage":
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile goes with zero_stage 0, 1 or 2: stage 3 gathers weights amid the network's graph")
        return self


class CoupledStage(NetworkStage):
    """What every stage has that trains a network on couplings."""

    parent_keys: ClassVar[dict[str, str]] = {"init": "model", "couplings": "couplings"}

    couplings: str
    """A couple stage, or the folder of one."""


def perceptual_parent(perceptual: Perceptual | None) -> dict[str, str]:
    """The stage or folder of a network of one's own that a loss measures by."""
    network = perceptual.network if perceptual else None
    return {"perceptual.network": network} if network and network not in BACKBONES else {}


def perceptual_files(perceptual: Perceptual | None) -> dict[str, str]:
    named = {key: getattr(perceptual, key, None) for key in ("weights", "decoder")}
    return {f"perceptual.{key}": path for key, path in named.items() if path}


def perceptual_package(perceptual: Perceptual | None) -> dict[str, str]:
    network = perceptual.network if perceptual else None
    return {"lpips": f"perceptual.network: {network}"} if network in BACKBONES else {}


class FlowStage(CoupledStage):
    """What reflow and distillation by one step share: a network trained from a coupled noise to its data."""

    parent_keys: ClassVar[dict[str, str]] = CoupledStage.parent_keys | {"perceptual.network": "perceptual network"}
    free_keys: ClassVar[frozenset[str]] = TrainingStage.free_keys | {"preview"}

    phases: Annotated[list[FlowPhase], Field(min_length=1)]
    """Stretches of training, one after the other, each with its loss."""
    perceptual: Perceptual | None = None
    """For a phase whose loss is perceptual."""
    parametrization: Parametrization = "velocity"
    """What the network is trained to answer: a velocity; or what its diffusion teacher answered, read as a velocity
    ("epsilon", also for an EDM, which stays one); or that, with uniform timesteps and the loss on the data that it
    predicts ("rectified-diffusion", in reflow alone)."""
    negate_output_at_start: bool = False
    """Negate the last convolution of an epsilon teacher before training, as a flow of the paper's sign would see it."""
    stacked: bool = False
    """Train two U-Nets in series, as InstaFlow-1.7B: copies of `init`, which at the start return what it does. What is
    two U-Nets already stays so without this."""
    preview: Preview | None = Preview()
    """What the moving average draws on the way, kept as a picture and two figures; null for none."""

    @property
    def keeps_view(self) -> bool:
        """Whether the trained network is read as its teacher is, whatever it was trained by."""
        return self.parametrization != "velocity"

    def parents(self) -> dict[str, str]:
        return {"init": self.init, "couplings": self.couplings, **perceptual_parent(self.perceptual)}

    def files(self) -> dict[str, str]:
        return perceptual_files(self.perceptual)

    def packages(self) -> dict[str, str]:
        return super().packages() | perceptual_package(self.perceptual)

    @model_validator(mode="after")
    def perceptual_goes_with_a_loss(self) -> "FlowStage":
        wanted = [phase.loss for phase in self.phases if phase.loss in PERCEPTUAL_LOSSES]
        if wanted and self.perceptual is None:
            raise ValueError(f"loss: {wanted[0]} needs a section 'perceptual' that says by which network")
        if self.perceptual and not wanted:
            raise ValueError(f"perceptual goes with a phase of loss: {' or '.join(PERCEPTUAL_LOSSES)}")
        return self

    @model_validator(mode="after")
    def sign_of_a_velocity(self) -> "FlowStage":
        if self.negate_output_at_start and self.parametrization != "velocity":
            raise ValueError("negate_output_at_start goes with parametrization: velocity")
        return self


class ReflowStage(FlowStage):
    """Trains the next rectified flow on couplings (InstaFlow, Eq. 5)."""

    parent_keys: ClassVar[dict[str, str]] = FlowStage.parent_keys | {"real.couplings": "couplings"}

    kind: Literal["reflow"]
    real: RealCouplings | None = None
    """Real images among the couplings, so that the flow stays near to them (2-rectified flow++, arXiv 2405.20320)."""
    time_density: TimeDensity = "uniform"
    """How often each time is visited: most often both ends by "u-shaped", the middle by "logit-normal"."""
    caption_dropout: Fraction = 0.1
    """The share of prompts left empty, so that the unconditional branch stays trained."""
    num_steps: Steps = 25
    """With `guidance_scale`, the default that the model folder carries for sampling."""
    guidance_scale: NonNegativeFloat = 1.5
    """Of the flow that comes out; the guidance of the couplings is trained in."""

    @model_validator(mode="after")
    def form_of_rectified_diffusion(self) -> "ReflowStage":
        if self.parametrization == "rectified-diffusion":
            if self.time_density != "uniform":
                raise ValueError(
                    "parametrization: rectified-diffusion draws its timesteps uniformly; leave out time_density"
                )
            if any(phase.loss == "lpips-huber" for phase in self.phases):
                raise ValueError(
                    "loss: lpips-huber is of velocities; with rectified-diffusion choose pseudo-huber or lpips"
                )
        return self

    def parents(self) -> dict[str, str]:
        return super().parents() | ({"real.couplings": self.real.couplings} if self.real else {})


class EvaluateStage(Stage):
    """Measures models by one protocol and writes report.html, report.md and report.json."""

    parent_keys: ClassVar[dict[str, str]] = {"perceptual.network": "perceptual network"}
    remade: ClassVar[bool] = True

    kind: Literal["evaluate"]
    protocol: Literal[DigitsForm, ImageForm]
    """What the models are asked for, and by what their images are judged."""
    captions: str | None = None
    """Of a protocol of captions: COCO's JSON, or a text file of a prompt a line, of which the first are taken."""
    captions_seed: NonNegativeInt = 0
    """Of coco2014-30k, where captions are COCO's JSON: which of them."""
    real: str | None = None
    """The folder of the real images, such as COCO's val2017."""
    features: Annotated[str, Field(min_length=1)] = "inception"
    """Of a protocol of images, what distances are measured in: "inception", FID's network with its own resize, or
    "inception-clean-fid", with clean-fid's; "pixels"; or a folder, of a classifier (a teacher stage's `perceptual`) or
    of an autoencoder (a pipeline's `vae`)."""
    perceptual: Perceptual | None = None
    """By which network it is measured how different images look: each from the reference's of the same noise, and those
    of one prompt from one another. Null for neither."""
    clip: Literal["clip-vit-g-14", "clip-vit-l-14"] | None = "clip-vit-g-14"
    """By which network CLIP scores are measured, of a protocol of captions alone; null for none."""
    clip_prefix: str = ""
    """What is put before each caption for CLIP; DMD's is "A photo depicts "."""
    models: Annotated[list[EvaluatedModel], Field(min_length=1)]
    """Each with its numbers of steps."""
    reference: Reference
    """Whose images those of the same noise and prompt are compared with: one of the models."""
    aims: list[Aim] = []  # noqa: RUF012  (pydantic copies it)
    """What the models are meant to reach: the report tells which aims are reached and which are missed."""
    num_samples: Annotated[int, Field(ge=4)] | None = None
    """Images of each model at each number of steps; by default the protocol's own, 2,000 of digits."""
    batch_size: PositiveInt | None = None
    """Images made at a time; by default 250 digits, or 16 others."""
    dtype: Dtype = "float32"
    """The networks' precision while they sample, and their decoders'; what judges the images has float32."""
    compared_samples: Annotated[int, Field(ge=2)] = 2000
    """Of them, so many images are kept, the first: to be shown, and to be compared with the reference's."""
    beside: list[str] = []  # noqa: RUF012  (pydantic copies it)
    """Earlier reports (report.json) whose rows are shown beside these, without figures that were measured otherwise;
    one of another protocol is refused."""
    straightness_samples: PositiveInt = 256
    """Paths that S(Z) is measured on."""
    straightness_steps: Steps = 100
    """Euler's steps of each."""

    def parents(self) -> dict[str, str]:
        models = {f"models.{i}.model": entry.model for i, entry in enumerate(self.models)}
        return models | perceptual_parent(self.perceptual)

    def packages(self) -> dict[str, str]:
        return perceptual_package(self.perceptual)

    @property
    def draws_captions(self) -> bool:
        """Whether captions are drawn from COCO's by `captions_seed`; else those of a file are taken in order."""
        return self.protocol == "coco2014-30k" and self.captions is not None and is_coco(self.captions)

    @property
    def of_images(self) -> bool:
        """Whether it goes by real images on the disk, and not by the miniature's."""
        return self.protocol in get_args(ImageForm)

    @property
    def count(self) -> int:
        """Images of each row."""
        return self.num_samples or NUM_SAMPLES[self.protocol]

    @property
    def batch(self) -> int:
        """Images made at a time."""
        return min(self.batch_size or (16 if self.of_images else 250), self.count)

    @property
    def features_folder(self) -> str | None:
        """The folder of the network whose features distances are measured in, if it is one of one's own."""
        return None if self.features in FEATURES else self.features

    @model_validator(mode="after")
    def whole_images_are_compared(self) -> "EvaluateStage":
        for key in ("decoder", "crop"):
            if getattr(self.perceptual, key, None) is not None:
                raise ValueError(f"perceptual.{key} goes with training: an evaluation compares whole images, as drawn")
        return self

    def without_use(self) -> set[str]:
        return set() if self.of_images else set(FOR_IMAGES)

    @model_validator(mode="after")
    def sources_of_the_protocol(self) -> "EvaluateStage":
        if not self.of_images:
            given = [key for key in FOR_IMAGES if getattr(self, key) != type(self).model_fields[key].default]
            if given:
                raise ValueError(f"{given[0]} goes with protocol: {', '.join(get_args(ImageForm))}")
            return self
        if self.real is None:
            raise ValueError(f"real: protocol {self.protocol} needs the folder of the real images")
        by_class = self.protocol == "imagenet64-50k"
        if by_class and self.captions:
            raise ValueError(f"captions: protocol {self.protocol} asks for classes")
        if not by_class and self.captions is None:
            raise ValueError(f"captions: protocol {self.protocol} needs a file of them")
        if self.captions_seed and not self.draws_captions:
            raise ValueError("captions_seed draws from COCO's own JSON, for protocol coco2014-30k; here none are drawn")
        return self

    def files(self) -> dict[str, str]:
        named = {"captions": self.captions, "features": self.features_folder}
        beside = {f"beside.{i}": place for i, place in enumerate(self.beside)}
        return {key: place for key, place in named.items() if place} | perceptual_files(self.perceptual) | beside

    @model_validator(mode="after")
    def reference_is_measured(self) -> "EvaluateStage":
        averaged = [entry for entry in self.models if entry.weights == "ema"]
        rows = {(entry.model, steps) for entry in averaged for steps in entry.num_steps}
        if (self.reference.model, self.reference.num_steps) not in rows:
            steps = f"{self.reference.num_steps} step{'s' if self.reference.num_steps > 1 else ''}"
            wanted = f"reference: '{self.reference.model}' at {steps} is not among the models"
            raw = any(entry.model == self.reference.model for entry in self.models if entry.weights == "raw")
            raise ValueError(f"{wanted} with its moving average (weights: ema)" if raw else wanted)
        [of_it] = [entry for entry in averaged if entry.model == self.reference.model][:1]
        scale, scales = self.reference.guidance_scale, of_it.scales
        if scale is not None and None not in scales and scale not in scales:
            raise ValueError(
                f"reference.guidance_scale: '{of_it.model}' is not measured at {scale:g}; choose "
                f"{' or '.join(f'{one:g}' for one in scales if one is not None)}"
            )
        for model, times in Counter((entry.model, entry.weights) for entry in self.models).items():
            if times > 1:
                raise ValueError(
                    f"models: '{model[0]}' stands {times} times with the same weights; give its step counts in one "
                    "list, num_steps, and its guidance scales in another, guidance_scales"
                )
        return self

    @model_validator(mode="after")
    def aims_are_measured(self) -> "EvaluateStage":
        rows = {(entry.model, steps) for entry in self.models for steps in entry.num_steps}
        for i, aim in enumerate(self.aims):
            for key, model in (("model", aim.model), ("better_than", aim.better_than)):
                if model is not None and (model, aim.num_steps) not in rows:
                    steps = f"{aim.num_steps} step{'s' if aim.num_steps > 1 else ''}"
                    raise ValueError(f"aims.{i}.{key}: '{model}' at {steps} is not among the models")
            scores = self.of_images and self.clip and self.captions
            if (aim.figure == "clip_score" and not scores) or (aim.figure == "prompt_accuracy" and self.of_images):
                raise ValueError(f"aims.{i}.figure: no {aim.figure} is measured here")
        return self
