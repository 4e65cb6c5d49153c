"""The benchmarks measure the architecture that they say."""

import torch

from benchmarks.measuring import networks


def test_sd15_has_the_size_of_the_real_one() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in network.parameters()) for network in networks("sd15", None)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
