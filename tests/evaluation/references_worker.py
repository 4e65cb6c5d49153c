"""One of several processes that extract the features of a folder's images: REAL KEPT FEATURES."""

import sys
from pathlib import Path

import numpy as np

from instaflow.evaluation.observations import Observations
from instaflow.evaluation.references import RealImages, reference_features
from instaflow.world import barrier, leave, world
from tests.evaluation.stand_ins import pixels


def main(real: str, kept: str, out: str) -> None:
    place, own = world(), 0
    write = Observations.write

    def counted(self, batch, observed):
        nonlocal own
        own += 1
        write(self, batch, observed)

    Observations.write = counted
    found = reference_features(RealImages.of(Path(real)), pixels(2), 16, 2, Path(kept))
    if place.leads:
        np.save(out, found)
    Path(f"{out}-{place.rank}").write_text(str(own))
    barrier()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
