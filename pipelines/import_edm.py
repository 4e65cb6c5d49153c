"""EDM's ADM network from a state dict, written as a model's folder: what `instaflow import-edm` does."""

from pathlib import Path

from diffusers import EDMDPMSolverMultistepScheduler
from safetensors.torch import load_file

from instaflow.errors import ConfigError, DataError
from instaflow.models.adm import network_of
from instaflow.models.export import save_model
from instaflow.models.settings import ModelSettings
from instaflow.places import PICKLES

STEPS = 18


def run(file: Path, folder: Path, names: Path | None) -> str:
    """Write the folder; returns a line that says what it holds. Raises ConfigError or DataError."""
    if file.suffix in PICKLES:
        raise DataError(
            f"'{file}' is a pickle, which can run code as it is loaded; this toolkit reads none",
            "Extract its state dict where you trust it: `instaflow import-edm --help` has the lines",
        )
    if not file.is_file():
        raise DataError(
            f"There is no file '{file}'", "It is EDM's state dict: `instaflow import-edm --help` tells more"
        )
    if folder.exists():
        raise ConfigError(f"'{folder}' is there already", "Choose another folder, or delete it")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"The folder of '{folder}' does not exist", "Make it first")
    try:
        state = load_file(file)
    except Exception as error:  # safetensors raises its own kinds
        raise DataError(f"'{file}' is no .safetensors file: {error}", "Extract the state dict anew") from error
    unet = network_of(state)
    classes = unet.config["num_class_embeds"] or 0
    class_names = names_in(names, classes) if names else []
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    save_model(
        folder,
        unet=unet,
        scheduler=EDMDPMSolverMultistepScheduler(solver_order=2),
        settings=ModelSettings(
            kind="teacher",
            parametrization="edm",
            num_steps=STEPS,
            guidance_scale=1.0,
            class_names=class_names,
            lineage=[{"stage": file.name, "kind": "import", "summary": "an ADM network of EDM's"}],
        ),
    )
    side = unet.config["sample_size"]
    return (
        f"{folder}: {parameters:,} parameters, images of {side}×{side}, {f'{classes:,}' if classes else 'no'} classes"
    )


def names_in(file: Path, classes: int) -> list[str]:
    """The classes' names, one a line. Raises ConfigError."""
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        message = f"'{file}' is not UTF-8 text (byte {error.start})"
        raise ConfigError(message, "Save it as UTF-8, or convert it: iconv -f LATIN1 -t UTF-8") from error
    if blank := [number for number, name in enumerate(names, 1) if not name.strip()]:
        raise ConfigError(f"Line {blank[0]} of '{file}' is blank", "Write a class's name there, or delete the line")
    if len(names) != classes or len(set(names)) < len(names):
        raise ConfigError(
            f"'{file}' has {len(names):,} lines, {len(set(names)):,} of them different, and the network {classes:,} "
            "classes",
            "Write each class's name on a line of its own, in the order of their numbers",
        )
    return names
