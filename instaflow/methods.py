"""What each method of distillation takes: a distill stage's schema, and the tables of all kinds and methods."""

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from instaflow.sections import (
    FakeScore,
    Fraction,
    Gan,
    HalvingPhase,
    MatchingPhase,
    NonNegativeFloat,
    Perceptual,
    Preview,
    Regression,
)
from instaflow.stages import (
    CoupledStage,
    CoupleStage,
    EdmTeacherStage,
    EvaluateStage,
    FlowStage,
    NetworkStage,
    PromptsFrom,
    ReflowStage,
    Stage,
    TeacherStage,
    TrainingStage,
    perceptual_files,
    perceptual_package,
    perceptual_parent,
)


class DistillStage(FlowStage):
    """Trains a one-step student on couplings (InstaFlow, Eq. 6)."""

    kind: Literal["distill"]
    method: Literal["instaflow"] = "instaflow"

    @model_validator(mode="after")
    def losses_of_a_student(self) -> "DistillStage":
        if self.parametrization == "rectified-diffusion":
            raise ValueError(
                "parametrization: a student's loss is on its data anyhow; for rectified-diffusion say epsilon"
            )
        if any(phase.loss == "lpips-huber" for phase in self.phases):
            raise ValueError("loss: lpips-huber weighs two losses by time, which a student has not; choose lpips")
        return self


class ProgressiveStage(CoupledStage):
    """Halves a model's steps phase by phase: progressive distillation (Salimans & Ho 2022, arXiv 2202.00512).

    In each phase a student learns to land in one step where its teacher lands in two; the first teacher is `init`, the
    next ones are the students' moving averages. `couplings` give the data with its prompts, and none of their noise:
    that is drawn anew for each sample. The network stays what `init` is, a diffusion or a velocity flow.
    """

    kind: Literal["distill"]
    method: Literal["progressive"]
    phases: Annotated[list[HalvingPhase], Field(min_length=1)]
    """The halvings: one for each number of steps."""
    guidance_scale: NonNegativeFloat
    """The first teacher's, learned in the first phase; every student is sampled without. 1 or less: none."""

    @model_validator(mode="after")
    def steps_are_halved(self) -> "ProgressiveStage":
        counts = [phase.num_steps for phase in self.phases]
        if any(2 * after != before for before, after in pairwise(counts)):
            raise ValueError(
                f"phases: num_steps must halve from one phase to the next, say 8, 4, 2, 1, and {counts} do not"
            )
        if 2 * counts[0] > 1000:
            raise ValueError(
                f"phases: the first teacher would take {2 * counts[0]} steps, twice num_steps, and a schedule has 1000 "
                "timesteps; begin with 500 at most"
            )
        return self


class DmdStage(NetworkStage):
    """Matches a generator's distribution with its teacher's: DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867).

    The generator is a copy of `init` that makes an image in one step or few. Noised again, its images are judged by two
    diffusion models: `teacher`, frozen, and a copy of it that is trained on the generator's images all along.
    """

    parent_keys: ClassVar[dict[str, str]] = NetworkStage.parent_keys | {
        "teacher": "model",
        "regression.couplings": "couplings",
        "gan.real": "couplings",
        "perceptual.network": "perceptual network",
    }
    free_keys: ClassVar[frozenset[str]] = TrainingStage.free_keys | {"preview", "prompts"}

    kind: Literal["distill"]
    method: Literal["dmd"]
    phases: Annotated[list[MatchingPhase], Field(min_length=1)]
    """Stretches of training, counted in samples of the generator."""
    teacher: str
    """The real score: a diffusion, or a flow."""
    prompts: PromptsFrom
    """What the generator is asked for, each as often as any other."""
    guidance_scale: NonNegativeFloat
    """Of the real score; the generator takes it over, and is sampled without. 1 or less: none."""
    num_steps: Annotated[int, Field(ge=1, le=100)] = 1
    """The generator's: 1, or DMD2's 4, between which noise is added anew; it divides 1000."""
    noise_range: tuple[Fraction, Fraction] = (0.02, 0.98)
    """The part of the noise schedule, 0 at the data, in which the two scores are compared."""
    fake: FakeScore = FakeScore()
    """How the score of the generator's images is trained."""
    regression: Regression | None = None
    """To make the coupled image of a coupled noise; null for none."""
    gan: Gan | None = None
    """A discriminator; null for none."""
    perceptual: Perceptual | None = None
    """For a regression by lpips."""
    preview: Preview | None = None
    """What the moving average draws on the way from the regression's couplings; null for none."""

    @property
    def sections(self) -> dict[str, str]:
        """The sections' parents, by the place of each."""
        pairs = {"regression.couplings": self.regression.couplings} if self.regression else {}
        return pairs | ({"gan.real": self.gan.real} if self.gan else {})

    def weight(self, term: Literal["regression", "gan"], phase: MatchingPhase) -> float:
        """How much a term counts in a phase; 0 for one that there is not."""
        section = self.regression if term == "regression" else self.gan
        own = phase.regression_weight if term == "regression" else phase.gan_weight
        return 0.0 if section is None else section.weight if own is None else own

    def parents(self) -> dict[str, str]:
        return {"init": self.init, "teacher": self.teacher, **self.sections, **perceptual_parent(self.perceptual)}

    def files(self) -> dict[str, str]:
        return perceptual_files(self.perceptual)

    def packages(self) -> dict[str, str]:
        return super().packages() | perceptual_package(self.perceptual)

    @field_validator("noise_range", mode="before")
    @classmethod
    def pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # as YAML has it

    @model_validator(mode="after")
    def parts_go_together(self) -> "DmdStage":
        low, high = self.noise_range
        if low >= high:
            raise ValueError(f"noise_range: {low:g} is not below {high:g}")
        if self.zero_stage == 3:
            raise ValueError("zero_stage: method dmd goes with 0, 1 or 2, for each of its networks asks the other one")
        if self.gan and self.compile:
            raise ValueError("compile goes without gan, whose discriminator leaves the network in its middle")
        if self.num_steps > 1 and self.compile:
            raise ValueError(
                "compile goes with num_steps: 1, for each of several steps takes as many samples as were drawn for it, "
                "and a network is compiled anew for every number, until PyTorch gives up"
            )
        if 1000 % self.num_steps:
            raise ValueError(
                f"num_steps: {self.num_steps} does not divide a schedule's 1000 timesteps; choose 1, 2 or 4"
            )
        if self.regression and self.num_steps > 1:
            raise ValueError("regression goes with num_steps: 1, for a coupled noise says nothing of the noise between")
        regressed = any(self.weight("regression", phase) for phase in self.phases)
        by_lpips = self.regression is not None and self.regression.loss == "lpips" and regressed
        if by_lpips and self.perceptual is None:
            raise ValueError("regression.loss: lpips needs a section 'perceptual' that says by which network")
        if self.perceptual and not by_lpips:
            raise ValueError("perceptual goes with regression.loss: lpips, and with a weight above 0 in some phase")
        if self.preview and not self.regression:
            raise ValueError("preview goes with a regression, whose couplings it draws")
        for key, section in (("regression_weight", self.regression), ("gan_weight", self.gan)):
            if section is None and any(getattr(phase, key) is not None for phase in self.phases):
                raise ValueError(f"phases: {key} goes with a section '{key.removesuffix('_weight')}'")
        for size in [phase.global_batch_size for phase in self.phases]:
            takes = [few for few in range(1, min(self.micro_batch_size or size, size) + 1) if size % few == 0]
            if self.regression and not any(map(self.regression.fits, takes)):  # on no number of processes
                raise ValueError(
                    f"regression.share: {self.regression.share:g} of {takes[-1]} samples, which a process takes at a "
                    "time, is no whole number"
                )
        matched = self.regression is not None and self.regression.matched
        if self.regression and not matched and not regressed:
            raise ValueError("regression: its weight is 0 in every phase and its samples are not matched; leave it out")
        if self.gan and not any(self.weight("gan", phase) for phase in self.phases):
            raise ValueError(
                "gan: its weight is 0 in every phase, so its discriminator would do nothing; leave gan out"
            )
        return self


KINDS: dict[str, type[Stage]] = {
    "teacher": TeacherStage,
    "couple": CoupleStage,
    "reflow": ReflowStage,
    "distill": DistillStage,
    "evaluate": EvaluateStage,
}
METHODS: dict[str, type[Stage]] = {"instaflow": DistillStage, "progressive": ProgressiveStage, "dmd": DmdStage}
"""The schemas of a distill stage, by its method."""
TEACHERS: dict[str, type[Stage]] = {"latent": TeacherStage, "edm": EdmTeacherStage}
"""Those of a teacher stage."""
