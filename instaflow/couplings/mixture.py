"""One stream of two couple stages' couplings: a share of real ones among those of the model."""

from dataclasses import dataclass

import numpy as np

from instaflow.couplings.loader import Batch, Couplings
from instaflow.streams import random_stream, stream_key

BLOCK = 1000  # positions, of which just the share are real


@dataclass(frozen=True)
class Span:
    """A stretch of one source's own stream."""

    couplings: Couplings
    position: int
    size: int


class Mixture:
    """`share` of the positions hold a coupling of `real`, the others one of `couplings`.

    Which ones is drawn by seed and stage for each block of `BLOCK` positions, with the share of each block exact to a
    thousandth. What is drawn from a source comes in that source's own order, so that each of its records is seen once
    in each of its epochs. A position fixes its record by arithmetic alone.
    """

    def __init__(self, couplings: Couplings, real: Couplings, share: float, *, seed: int, stage: str) -> None:
        self.couplings, self.real = couplings, real
        self._per_block = round(share * BLOCK)
        self._key = stream_key("mixture", seed, stage)

    def batch(self, position: int, size: int) -> Batch:
        """The `size` records from `position` on; `indices` count in the stage that a record comes from."""
        is_real = self._are_real(position, size)
        order = np.argsort(np.concatenate([np.flatnonzero(~is_real), np.flatnonzero(is_real)]))
        parts = [span.couplings.batch(span.position, span.size) for span in self.spans(position, size)]
        prompts = [prompt for part in parts for prompt in part.prompts]
        return Batch(
            noise=np.concatenate([part.noise for part in parts])[order],
            latent=np.concatenate([part.latent for part in parts])[order],
            prompts=[prompts[row] for row in order],
            indices=np.concatenate([part.indices for part in parts])[order],
        )

    def spans(self, position: int, size: int) -> list[Span]:
        """What those records are in the streams of the sources; one that gives none is not told."""
        before, now = self._num_real(position), int(self._are_real(position, size).sum())
        spans = Span(self.couplings, position - before, size - now), Span(self.real, before, now)
        return [span for span in spans if span.size]

    def _num_real(self, position: int) -> int:
        """How many real ones stand before a position."""
        block, offset = divmod(position, BLOCK)
        return block * self._per_block + int(self._block(block)[:offset].sum())

    def _are_real(self, position: int, size: int) -> np.ndarray:
        """Whether each of the `size` records from `position` on is real: bool [size]."""
        first, last = position // BLOCK, (position + size - 1) // BLOCK
        blocks = np.concatenate([self._block(block) for block in range(first, last + 1)])
        return blocks[position - first * BLOCK :][:size]

    def _block(self, block: int) -> np.ndarray:
        return random_stream(self._key, block).permutation(BLOCK) < self._per_block
