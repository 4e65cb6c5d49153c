"""What the folder of a trained model carries, by its stage and the model that training started from."""

from typing import Any

from instaflow.methods import DmdStage
from instaflow.models.model import Model
from instaflow.models.samplers import few_step_scheduler, flow_scheduler
from instaflow.models.settings import ModelSettings
from instaflow.stages import FlowStage, NetworkStage, ReflowStage
from pipelines.experiment import num_steps_of


def settings_of(stage: NetworkStage, model: Model) -> ModelSettings:
    """How the model that `stage` makes of `model` is read and sampled; its lineage is told when it is written."""
    own = model.settings.parametrization
    if isinstance(stage, FlowStage) and not stage.keeps_view:
        own = "velocity"
    if isinstance(stage, ReflowStage):
        return ModelSettings("flow", own, stage.num_steps, stage.guidance_scale)
    return ModelSettings("student", own, num_steps_of(stage), guidance_scale=1.0)


def scheduler_of(stage: NetworkStage, model: Model) -> Any:
    """The stock scheduler that samples it so."""
    if isinstance(stage, DmdStage) and stage.num_steps > 1:
        return few_step_scheduler(model.scheduler, stage.num_steps)
    return flow_scheduler(settings_of(stage, model).parametrization, model.scheduler)
