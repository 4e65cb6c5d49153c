"""A model in another form, for other programs: what `instaflow export` does."""

import shutil
from pathlib import Path

from instaflow.errors import ConfigError
from instaflow.files import replace_folder
from instaflow.models.device import device, set_up_cpu
from instaflow.models.loading import load_model
from instaflow.models.model import Model
from instaflow.models.released import write_released


def run(place: str, output: Path, to: str) -> str:
    """Write the model at `place` as `output`; returns a line that says what was done. Raises ConfigError, DataError."""
    if output.exists():
        raise ConfigError(f"'{output}' is there already", "Choose another name, or delete it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{output}' does not exist", "Make it first")
    set_up_cpu()
    model = load_model(place, device=device())
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    said = FORMATS[to](model, temporary)
    replace_folder(temporary, output)
    return f"{output}: {said}"


def to_instaflow(model: Model, folder: Path) -> str:
    write_released(model, folder)
    return "for InstaFlow's RectifiedFlowPipeline"


FORMATS = {"instaflow": to_instaflow}
"""What writes a model into a folder that isn't there yet, and says what it wrote."""
