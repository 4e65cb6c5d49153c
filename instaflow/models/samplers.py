"""Deterministic samplers: which stock scheduler integrates a model from noise to data, and how it is set."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from instaflow.errors import ConfigError, DataError
from instaflow.models.edm_heun import EdmHeunScheduler

NOISY = LCMScheduler.__name__
"""Its steps draw noise between them: no path leads from the first noise to the image."""
KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "steps_offset",
)
"""What a sampler takes over from its teacher: the noise schedule, and what the network predicts."""
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SOLVER = SIGMAS | {"solver_order": 2, "final_sigmas_type": "zero", "use_flow_sigmas": False, "thresholding": False}
TO_DATA = {"set_alpha_to_one": True}  # the last step ends at the data itself
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm-solver++": (
        DPMSolverMultistepScheduler,
        SOLVER | {"algorithm_type": "dpmsolver++", "use_lu_lambdas": False},
    ),
    "ddim": (DDIMScheduler, TO_DATA | {"clip_sample": False, "thresholding": False}),
    "pndm": (PNDMScheduler, TO_DATA | {"skip_prk_steps": True}),
    "heun": (HeunDiscreteScheduler, SIGMAS | {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, SOLVER | {"solver_type": "bh2", "predict_x0": True}),
}
"""The samplers of a diffusion teacher. Heun's state is in units of sigma: it multiplies the noise by
`init_noise_sigma` and calls the network 2 N - 1 times for N steps."""
EDM_KEPT = ("sigma_min", "sigma_max", "sigma_data", "rho")
EDM_SAMPLERS: dict[str, Any] = {
    "heun": EdmHeunScheduler,
    "dpm-solver++": EDMDPMSolverMultistepScheduler,
    "ddim": EDMEulerScheduler,
}
"""Those of an EDM, which are DDIM's and Euler's step at once: dx̃/dσ = ε̂."""


def coupling_scheduler(model: Any, sampler: str | None = None, timestep_spacing: str | None = None) -> Any:
    """The deterministic sampler that couples noise with the images of `model`, a TextToImage.

    A flow brings its own: one of its steps is an Euler step. A diffusion teacher is sampled on its own noise schedule,
    by DPM-Solver++ (multistep, second order) unless `sampler` says otherwise, with the spacing pinned: "trailing"
    begins at the last timestep, whose input the noise is; an EDM on its grid of σ, by Heun's method unless told
    otherwise. Raises ConfigError if the two don't go with the model, DataError for a teacher whose schedule is no
    Stable Diffusion's.
    """
    parametrization = model.settings.parametrization
    if model.settings.kind != "teacher":
        if sampler not in (None, "euler"):
            raise ConfigError(
                f"'sampler: {sampler}' is a diffusion teacher's; '{model.name}' is a flow, which Euler's method solves",
                "Leave it out, or write euler",
            )
        if timestep_spacing and parametrization != "epsilon":
            kind = "a velocity flow" if parametrization == "velocity" else "an EDM"
            raise ConfigError(f"'timestep_spacing' does nothing for {kind} such as '{model.name}'", "Leave it out")
        if isinstance(model.scheduler, LCMScheduler):
            raise ConfigError(
                f"'{model.name}' draws noise between its steps, and a coupling must follow from its first noise alone",
                "Couple its teacher, or a student of one step",
            )
        return model.scheduler
    if sampler == "euler":
        raise ConfigError(
            f"'sampler: euler' is a flow's, and '{model.name}' is a diffusion teacher",
            "Write ddim: one of its steps is the Euler step of the teacher's flow",
        )
    if parametrization == "edm":
        if timestep_spacing:
            raise ConfigError(f"'timestep_spacing' does nothing for an EDM such as '{model.name}'", "Leave it out")
        if sampler not in (None, *EDM_SAMPLERS):
            known = ", ".join(EDM_SAMPLERS)
            raise ConfigError(f"'sampler: {sampler}' knows no EDM, which '{model.name}' is", f"Known: {known}")
        return edm_scheduler(EDM_SAMPLERS[sampler or "heun"], model.scheduler)
    model.view()  # raises DataError for a noise schedule that no flow can be read from
    scheduler_class, pinned = SAMPLERS[sampler or "dpm-solver++"]
    teacher = model.scheduler
    kept = {key: teacher.config[key] for key in KEPT if key in teacher.config}
    scheduler = scheduler_class.from_config(kept | pinned | {"timestep_spacing": timestep_spacing or "trailing"})
    if not torch.allclose(scheduler.alphas_cumprod, teacher.alphas_cumprod, rtol=1e-5, atol=1e-6):
        raise ConfigError(
            f"'sampler: {sampler}' cannot follow the noise schedule of '{model.name}', which ends without any signal",
            "Choose dpm-solver++, ddim or unipc",
        )
    return scheduler


def recorded_scheduler(sampler: dict[str, Any]) -> Any:
    """The sampler that a manifest describes: {"class": ..., and its config}. Raises DataError."""
    found = [scheduler for scheduler, _ in SAMPLERS.values()]
    classes = {scheduler.__name__: scheduler for scheduler in (*found, *EDM_SAMPLERS.values())}
    if sampler.get("class") not in classes:
        raise DataError(f"The manifest's sampler is of no class that makes couplings: {sampler.get('class')!r}")
    # JSON knows no infinity and has null in its place: such a setting is the class's own default, as it was.
    config = {key: value for key, value in sampler.items() if key != "class" and value is not None}
    return classes[sampler["class"]].from_config(config)


def flow_scheduler(parametrization: str, teacher: Any) -> Any:
    """The stock scheduler that a flow's folder carries: one of its steps is an Euler step of the flow."""
    if parametrization == "velocity":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            solver_order=1,
            final_sigmas_type="zero",
            steps_offset=1,  # no matter with these sigmas, but the pipeline insists
        )
    if parametrization == "edm":
        return edm_scheduler(EDMEulerScheduler, teacher)
    return DDIMScheduler.from_config(
        teacher.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
    )


def few_step_scheduler(teacher: Any, num_steps: int) -> Any:
    """The stock scheduler of a diffusion's student that adds noise anew between its steps (DMD2).

    Its timesteps are 1000 k / `num_steps` - 1: 999, 749, 499, 249 for four.
    """
    kept = {key: teacher.config[key] for key in KEPT if key in teacher.config}
    return LCMScheduler.from_config(
        kept | {"original_inference_steps": num_steps, "set_alpha_to_one": True, "clip_sample": False}
    )


def edm_scheduler(kind: Any, teacher: Any) -> Any:
    """An EDM's scheduler of some class, with the noise levels of another one."""
    return kind(**{key: teacher.config[key] for key in EDM_KEPT})
