"""What may be asked for, within which limits, and how a request that may not is refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from instaflow.config import nearest
from instaflow.errors import InstaFlowError

LONGEST_BODY = 256 * 1024
"""Bytes: a prompt of the greatest length, each character of it escaped."""
LONGEST_PROMPT = 20_000
MOST_IMAGES = 16
MOST_STEPS = 200
SHOWN = 60
"""So many characters of a wrong value stand in a message."""

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
            raise ValueError("'seeds' stands alone: leave out 'seed', 'seed_to' and 'position'")
        if (self.seed_to is None) != (self.position is None):
            raise ValueError("'seed_to' and 'position' belong together: give both or neither")
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
        reason = fault["ctx"]["error"]
        return Refused(400, f"The body is no JSON: {reason}", 'Send, say, {"prompt": "a handwritten seven"}')
    if fault["type"] == "extra_forbidden":
        return Refused(422, f"There is no '{path}'", nearest(path, ImageRequest.model_fields))
    if fault["type"] == "missing":
        return Refused(422, f"'{path}' is missing", 'Send, say, {"prompt": "a handwritten seven"}')
    if fault["type"] == "string_too_long":
        most = fault["ctx"]["max_length"]
        return Refused(422, f"'{path}' has more than {most:,} characters", "Models read no more than the beginning")
    rule = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return Refused(422, rule[0].upper() + rule[1:], "docs/serve.md tells what a request may hold")
    value = repr(fault["input"])
    value = value if len(value) <= SHOWN else value[:SHOWN] + "…"
    return Refused(422, f"'{path}' {rule}, not {value}", "docs/serve.md tells what a request may hold")
