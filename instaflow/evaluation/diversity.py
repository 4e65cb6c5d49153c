"""How much the images of one prompt differ: the mean perceptual distance of their pairs, as DMD2 measures it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

BATCH = 16


def diversity(
    images: Tensor, prompts: Sequence[str], distance: Callable[[Tensor, Tensor], Tensor], batch_size: int = BATCH
) -> float | None:
    """The mean over prompts of the mean distance of two of their images; None where no prompt stands twice.

    images: [N, 3, H, W] in [-1, 1]; prompts: [N]. distance: of each pair [B], of two batches of images.
    """
    places = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)
    groups = [list(combinations(of_one, 2)) for of_one in places.values() if len(of_one) > 1]
    if not groups:
        return None
    first, second = torch.tensor([pair for group in groups for pair in group]).T
    with torch.inference_mode():
        parts = [
            distance(images[ours], images[theirs]).double().cpu()
            for ours, theirs in zip(first.split(batch_size), second.split(batch_size), strict=True)
        ]
    means = [part.mean() for part in torch.cat(parts).split([len(group) for group in groups])]
    return float(torch.stack(means).mean())
