"""What a model is and where it comes from, in words: what `instaflow show` does."""

from pathlib import Path

from instaflow.errors import DataError
from instaflow.models.settings import FILE as SETTINGS
from instaflow.models.settings import ModelSettings, read_settings
from instaflow.places import check_folder
from instaflow.plurals import counted
from instaflow.provenance import FILE, provenance_of, told
from instaflow.using.metadata import read_about
from instaflow.using.metadata import told as told_by_image


def run(place: Path) -> str:
    """Markdown on the model in a folder, or on a PNG that one drew; no weights are loaded. Raises DataError.

    An exported folder may hold no pipeline, but a file, a LoRA, a delta or graphs. Its file may be named as well.
    """
    if place.is_file() and place.suffix.lower() == ".png":
        return f"# {place}\n\n{told_by_image(read_about(place))}"
    folder = place.parent if place.suffix == ".safetensors" and (place.parent / FILE).is_file() else place
    if folder.is_file():
        raise DataError(f"'{folder}' tells nothing", "A model's folder does, and a PNG that `instaflow sample` made")
    if not folder.is_dir():
        raise DataError(f"There is no '{folder}'", "Name a model's folder, such as runs/digits/student/model")
    if not (folder / FILE).is_file():
        check_folder(folder)
    inside = [folder, *sorted(one for one in folder.iterdir() if one.is_dir())]  # a single file's stand in a folder
    settings = read_settings(next((one for one in inside if (one / SETTINGS).is_file()), folder))
    found = provenance_of(folder, settings.lineage)
    licence = [f"The teacher's licence: {found.licence}."] if found.licence else []
    return "\n\n".join([f"# {place}", in_words(settings), *licence, told(found)])


def in_words(settings: ModelSettings) -> str:
    """How a model is read and sampled, in a line."""
    what = {"teacher": "A teacher", "flow": "A rectified flow", "student": "A student"}[settings.kind]
    guidance = f"guidance {settings.guidance_scale:g}" if settings.guidance_scale > 1 else "no guidance"
    facts = [f"parametrization {settings.parametrization}", counted(settings.num_steps, "step"), guidance]
    if any(entry.get("kind") != "import" for entry in settings.lineage):  # of a model from elsewhere nobody knows
        facts.append("moving average of the weights" if settings.weights == "ema" else "raw weights")
    return f"{what}: {', '.join(facts)}."
