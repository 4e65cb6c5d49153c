"""The protocol card of a figure: all that it depends on, to have it again and to compare it with its like alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from instaflow.errors import ConfigError

SUBJECT = ("model", "model_content", "weights", "num_steps", "guidance_scale", "sampler")
"""What a comparison compares."""
CIRCUMSTANCES = ("batch_size", "processes", "hardware", "versions")
"""What should make no difference, and is told for the case that it does."""
ASIDE = ("model", "kernel", "perceptual", "diversity", "straightness", *CIRCUMSTANCES)
"""What images do not depend on: by what they are compared once they are there, and how their model is called."""
SINCE = ("kernel",)
"""What earlier versions measured in the one way there was, which their cards do not tell: a card without it says
nothing against another."""

OF_LOOKS = ("perceptual", "diversity")
"""What the figures of a perceptual network alone depend on."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One row's card. Its subject is what was sampled and how; the protocol is by what it is judged."""

    model: str  # as the experiment names it
    model_content: str  # a stage's fingerprint, a folder's, or a hub model's commit
    weights: str  # "ema" or "raw"
    num_steps: int
    guidance_scale: float
    sampler: str  # the scheduler's class

    protocol: str  # "digits"
    num_samples: int
    prompts: str  # SHA-256 of the list, in order, with its length
    seed: int
    noise: str  # which noise
    dtype: str  # of the network
    image_size: str  # what is made, and what it is resized to, and how
    image_encoding: str  # how an image's values are rounded before it is judged
    features: str  # the extractor, with the hash of its weights
    reference: str  # the real images, with their number and hash
    kernel: str = ""  # of how many subsets, and how large ones, the kernel distance is the mean
    judge: str = ""  # what reads the images: "SVC ..." or a CLIP with its hash
    perceptual: str = ""  # by what network gap and diversity are measured, with the hash of its weights
    diversity: str = ""  # of how many images of how many prompts
    straightness: str = ""  # of how many paths in how many steps, of a row that has it

    batch_size: int
    processes: int
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """A name for what is observed under this card, the same for the same subject and protocol.

        Without what compares images that are there, such as a perceptual network: those stay what they are.
        """
        told = {name: value for name, value in asdict(self).items() if name not in ASIDE}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def subject(self) -> dict[str, Any]:
        """What was sampled, and how."""
        return {name: getattr(self, name) for name in SUBJECT}

    def circumstances(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CIRCUMSTANCES}


PROTOCOL = tuple(entry.name for entry in fields(Card) if entry.name not in (*SUBJECT, *CIRCUMSTANCES, "straightness"))
"""What must be the same for two rows to be compared; where straightness differs, it alone is left out."""


def prompts_hash(prompts: Sequence[str]) -> str:
    """ "2,000 prompts, SHA-256 ..." of a list in its order."""
    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return f"{len(prompts):,} prompts, SHA-256 {digest[:16]}"


def difference(
    card: Mapping[str, Any], other: Mapping[str, Any], but: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first entry of the protocol in which two cards differ, with both values; None if their figures compare.

    What a card lacks, one of an earlier version, was not measured: its entry would be empty; but for what is SINCE.
    but: entries that may differ, where the figures that depend on them are left out.
    """
    asked = [name for name in PROTOCOL if name not in SINCE or (card.get(name) and other.get(name))]
    entries = ((name, card.get(name, ""), other.get(name, "")) for name in asked if name not in but)
    return next((entry for entry in entries if entry[1] != entry[2]), None)


def check_alike(cards: Sequence[tuple[str, Mapping[str, Any]]], but: Sequence[str] = ()) -> None:
    """Refuse to set figures beside one another that were measured otherwise. cards: with whose they are.

    but: entries that may differ. Raises ConfigError, which names the entry.
    """
    for who, card in cards[1:]:
        first, whole = cards[0]
        if found := difference(whole, card, but):
            name, one, another = found
            raise ConfigError(
                f"{first} and {who} were measured by different protocols: '{name}' is {one!r} of the first and "
                f"{another!r} of the second",
                "Their figures say nothing beside one another: measure both by one protocol",
            )
