"""What a server asks of those who draw for it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from instaflow.serving.requests import ImageRequest


@dataclass(frozen=True)
class Offer:
    """A model that can be asked for."""

    name: str
    kind: Literal["teacher", "flow", "student"]
    num_steps: int  # recommended, as is the next
    guidance_scale: float
    prompts: Literal["text", "class", "none"]
    classes: list[str]  # of a class-conditional model, in the order of their numbers
    width: int  # pixels
    height: int
    max_tokens: int | None  # of a prompt; the rest is cut


@dataclass(frozen=True)
class Images:
    """The images of a request, PNG files, and how they were drawn."""

    images: list[bytes]
    num_steps: int
    guidance_scale: float
    truncated: bool  # whether the prompt was longer than the model reads
    note: str = ""  # what else is to be known of them; most often nothing


class Painter(Protocol):
    """Draws for a server; `draw` is called for one model after another, always in one thread."""

    @property
    def offers(self) -> Sequence[Offer]: ...

    def draw(self, model: str, asked: ImageRequest) -> Generator[None, None, Images]:
        """The drawing of a request: a step, then a pause, until it returns. Raises InstaFlowError for a bad prompt."""
        ...
