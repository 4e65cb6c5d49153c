"""What `instaflow sample` is asked for, and what of it makes no sense: told before anything heavy is loaded."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from pathlib import Path

from PIL import Image

from instaflow.errors import ConfigError
from instaflow.places import find_model
from instaflow.prompt_files import lines_of
from instaflow.prompt_sources import Prompts
from instaflow.sections import Dtype, PromptSource
from instaflow.using.metadata import Drawn, encoded
from instaflow.using.seeds import Seed, parse_seeds, written
from instaflow.world import worker

MOST = 4096  # images of a sheet
MOST_FILMED = 16  # images of each model


@dataclass(frozen=True)
class Request:
    """What a command asks for; its options by their names."""

    models: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    column: str | None = None
    seed: int | None = None
    seeds: str | None = None
    noise_file: Path | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    dtype: Dtype = "float32"
    batch_size: int = 64
    safety_checker: bool = True
    between: int | None = None
    animate: bool = False
    captions: bool = False
    latents_file: Path | None = None
    output: str | None = None
    shard_size: int | None = None
    worker_index: int | None = None
    worker_count: int | None = None

    @property
    def target(self) -> Path:
        return Path(self.output or ("steps.gif" if self.animate else "grid.png"))

    @property
    def is_folder(self) -> bool:
        return (self.output or "").endswith("/") or self.target.is_dir()

    @cached_property
    def named_seeds(self) -> list[Seed] | None:
        """Those of --seeds, which every prompt gets."""
        return None if self.seeds is None else parse_seeds(self.seeds)


@dataclass(frozen=True)
class Wanted:
    """The images of a command in their order: prompts, and each with its own noise or with all the seeds."""

    prompts: list[str]
    seeds: list[Seed] | None
    first: int = 0
    """The seed whose noise 0, 1, 2, ... the prompts have where no seeds are named."""

    def __len__(self) -> int:
        return len(self.prompts) * (1 if self.seeds is None else len(self.seeds))

    def prompt(self, index: int) -> str:
        return self.prompts[index if self.seeds is None else index // len(self.seeds)]

    def seed(self, index: int) -> Seed:
        return (self.first, index) if self.seeds is None else self.seeds[index % len(self.seeds)]

    def drawn(self, index: int) -> Drawn:
        return Drawn(self.prompt(index), written(self.seed(index)))


FILMS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
CLASHES = [
    ("--animate", "--between"),
    ("--animate", "--captions"),
    ("--animate", "--latents-out"),
    ("--between", "--noise-in"),
    ("several models", "--between"),
    ("several models", "--latents-out"),
    *(("a folder of images", other) for other in ("--animate", "--between", "--captions", "--noise-in")),
    ("a folder of images", "--latents-out"),
    ("a folder of images", "several models"),
]
"""What makes no sense together."""


def wanted_by(request: Request) -> Wanted:
    """The images that are asked for. Raises InstaFlowError where it can't be, or options don't go together."""
    scale = request.guidance_scale
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"'--guidance-scale' must be a finite number, not {scale}", "Try, say, 1.5")
    check_together(request)
    check_files(request)
    for place in request.models:
        if Path(place).exists():  # what is to be fetched is told later
            find_model(place)
    wanted = Wanted(prompts_of(request), request.named_seeds, request.seed or 0)
    check_count(request, wanted)
    return wanted


def check_together(request: Request) -> None:
    """Raises InstaFlowError for options that don't go together."""
    if bool(request.prompts) == (request.prompt_file is not None):
        both = "Both --prompt and --prompts are given" if request.prompts else "There is no prompt"
        raise ConfigError(both, "Give --prompt TEXT, as often as you like, or --prompts FILE")
    if request.column and request.prompt_file in (None, "-"):
        raise ConfigError("--column goes with a --prompts FILE that has columns", "Leave it out")
    noises = {"--seed": request.seed, "--seeds": request.seeds, "--noise-in": request.noise_file}
    given = [name for name, value in noises.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both say which noise is taken", "Leave one of them out")
    there = {
        "--animate": request.animate,
        "--between": request.between is not None,
        "--captions": request.captions,
        "--latents-out": request.latents_file is not None,
        "--noise-in": request.noise_file is not None,
        "several models": len(request.models) > 1,
        "a folder of images": request.is_folder,
    }
    for one, other in CLASHES:
        if there[one] and there[other]:
            raise ConfigError(f"{one} and {other} do not go together", "Leave one out, or do it by two commands")
    for name, value in {"--shard-size": request.shard_size, "--worker-count": request.worker_count}.items():
        if value and not request.is_folder:
            raise ConfigError(f"{name} is for a folder of images", "End --output in a slash: --output images/")
    worker(request.worker_index, request.worker_count)


def check_files(request: Request) -> None:
    """Raises ConfigError for a file or folder that can't be written."""
    output = request.target
    for file in (output, request.latents_file):
        if file and not file.absolute().parent.is_dir():
            raise ConfigError(f"The folder of '{file}' does not exist", "Make it first")
        if file and file.exists() and not (file.is_file() or (file is output and request.is_folder)):
            raise ConfigError(f"'{file}' is no regular file", "Choose another name")
        if file is output and request.is_folder and file.is_file():
            raise ConfigError(f"'{file}' is a file", "Give a folder, or leave the slash out")
    files = [file.resolve() for file in (output, request.latents_file, request.noise_file) if file]
    if len(set(files)) < len(files):
        raise ConfigError("Two of the files for noise, latents and image are one", "Give each its own name")
    if request.animate and output.suffix.lower() not in FILMS:
        raise ConfigError(f"'{output}' is in no format of films", f"Let it end in {', '.join(FILMS)}")
    if not request.is_folder:
        encoded(Image.new("RGB", (1, 1)), output)


def prompts_of(request: Request) -> list[str]:
    """The prompts, typed or read. Raises ConfigError."""
    if request.prompt_file is None:
        check_typed(request.prompts)
        return list(request.prompts)
    if request.prompt_file == "-":
        return typed_in()
    file = Path(request.prompt_file)
    if not (file.exists() or "://" in request.prompt_file or has_magic(request.prompt_file)):
        raise ConfigError(f"The file '{file}' does not exist", "A relative path starts where the command is typed")
    return list(Prompts(PromptSource(path=request.prompt_file, column=request.column)))


def typed_in() -> list[str]:
    """The prompts of standard input, one a line; blank lines do not count. Raises ConfigError."""
    lines = [line.removesuffix("\r") for _, line in lines_of(sys.stdin.buffer, "standard input")]
    if prompts := [line for line in lines if line and not line.isspace()]:
        return prompts
    raise ConfigError("Standard input holds no prompt", "Write one a line")


def check_typed(prompts: Sequence[str]) -> None:
    """Raises ConfigError where a prompt was typed in bytes that are no text."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            hint = "Type it in a terminal that is set to UTF-8"
            raise ConfigError(f"The prompt {prompt!r} is not UTF-8 (character {error.start})", hint) from error


def check_count(request: Request, wanted: Wanted) -> None:
    """Raises ConfigError for more images than fit, or too few for a way between them."""
    count = len(wanted) * len(request.models)
    if request.between is not None:
        stops = len(wanted.prompts) if len(wanted.seeds or [0]) == 1 else len(wanted.seeds or [0])
        if stops < 2:
            raise ConfigError("--between has nothing to go between", "Name several --seeds, or give several prompts")
        lines = 1 if len(wanted.seeds or [0]) == 1 else len(wanted.prompts)
        count = lines * ((stops - 1) * (request.between + 1) + 1)
    if request.animate and len(wanted) > MOST_FILMED:
        raise ConfigError(f"--animate shows {MOST_FILMED} images of a model at most, not {len(wanted):,}", "Take fewer")
    if not request.is_folder and count > MOST:
        hint = "End --output in a slash for a folder of images: --output images/"
        raise ConfigError(f"A sheet shows {MOST:,} images at most, not {count:,}", hint)
