"""What may be asked for, within which limits, and how a request that may not is refused."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from instaflow.config import nearest
from instaflow.errors import InstaFlowError
from instaflow.plurals import counted

LONGEST_BODY = 256 * 1024
"""Bytes: a prompt of the greatest length, each character of it escaped."""
LONGEST_PROMPT = 20_000
MOST_IMAGES = 16
MOST_STEPS = 200
SHOWN = 60
"""So many characters of a wrong value stand in a message."""
EXAMPLE = 'Send, say, {"prompt": "a handwritten seven"}'
RULES = {
    "model": ("a name", "GET /api/models lists the names"),
    "prompt": (f"text of at most {LONGEST_PROMPT:,} characters", "Models read no more than its beginning"),
    "seed": ("a whole number from 0 to 2^63 - 1", "Each such number is a noise of its own"),
    "seeds": (f"a list of 1 to {MOST_IMAGES} seeds", "Ask for more images in several requests"),
    "seed_to": ("a whole number from 0 to 2^63 - 1", "Each such number is a noise of its own"),
    "position": ("a number from 0 to 1", "0 is the noise of 'seed', 1 that of 'seed_to'"),
    "num_steps": (f"a whole number from 1 to {MOST_STEPS}", "Leave it out for the model's own"),
    "guidance_scale": ("a number from 0 to 100", "Leave it out for the model's own"),
    "client": ("text of 1 to 64 characters", "Leave it out where nobody's request is to be replaced"),
}
"""What each key must be, and the way out: both are read on the page, too."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Refused(InstaFlowError):
    """A request that is answered by an error: `status` is HTTP's, `headers` go with it."""

    def __init__(self, status: int, message: str, hint: str = "", **headers: str) -> None:
        super().__init__(message, hint)
        self.status, self.headers = status, headers


class ImageRequest(BaseModel):
    """One prompt's images: of a seed, of several, or of a point on the way from a seed's noise to another's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    """A name of GET /api/models; by default the first."""
    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    seed: Seed = 0
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MOST_IMAGES)] | None = None
    seed_to: Seed | None = None
    position: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the way along the great circle between the noises of `seed` and `seed_to`."""
    num_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    client: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Who asks: a newer request of the same client for the same model takes the place of one that waits."""

    @model_validator(mode="after")
    def check_noise(self) -> "ImageRequest":
        if self.seeds is not None and self.model_fields_set & {"seed", "seed_to", "position"}:
            raise ValueError("'seeds' stands alone", "Leave out 'seed', 'seed_to' and 'position', or 'seeds'")
        if (self.seed_to is None) != (self.position is None):
            raise ValueError("'seed_to' and 'position' belong together", "Give both or neither")
        return self

    @property
    def many(self) -> list[int]:
        """The seeds, one of each image."""
        return [self.seed] if self.seeds is None else self.seeds


def parse(body: bytes) -> ImageRequest:
    """Raises Refused."""
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)[0]) from error


def refusal(fault: Any) -> Refused:
    """The first fault that pydantic found, as an answer."""
    path = ".".join(map(str, fault["loc"]))
    if fault["type"] == "json_invalid":
        return Refused(400, f"The body is no JSON: {fault['ctx']['error']}", EXAMPLE)
    if fault["type"] == "extra_forbidden":
        return Refused(422, f"There is no '{path[:SHOWN]}'", nearest(path[:SHOWN], ImageRequest.model_fields))
    if fault["type"] == "missing":
        return Refused(422, f"'{path}' is missing", EXAMPLE)
    if fault["type"] == "value_error":
        message, hint = fault["ctx"]["error"].args
        return Refused(422, message, hint)
    if not path:
        return Refused(422, f"The body must be an object, not {shown(fault['input'])}", EXAMPLE)
    rule, hint = RULES["seed" if len(fault["loc"]) > 1 else path]
    hint = "Write it in quotes" if fault["type"] == "string_type" else hint
    return Refused(422, f"'{path}' must be {rule}, not {shown(fault['input'])}", hint)


def shown(value: Any) -> str:
    """A value as JSON; a list and a long text by their length."""
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= SHOWN:
        return text
    return counted(len(value), "character") if isinstance(value, str) else f"{text[:SHOWN]}…"
