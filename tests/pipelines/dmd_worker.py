"""One of two processes that train a stage by distribution matching under every ZeRO stage: all cases in one launch."""

import sys
from pathlib import Path

from instaflow.errors import Interrupted
from instaflow.world import barrier, leave
from tests.pipelines import alone

ZERO = (0, 1, 2)
AWAKE = "{samples: 8, global_batch_size: 4, learning_rate: 1e-3}"
RESTING = "{samples: 4, global_batch_size: 4, learning_rate: 1e-3, gan_weight: 0}"
PHASES = f"phases=[{RESTING}, {AWAKE}, {RESTING}]"
STOPPED = 2  # steps: the discriminator has woken up


def main(config: str, run: Path, done: Path) -> None:
    """Each stage whole in WHOLE-STAGE, and stopped and gone on in RESUMED-STAGE; the folders are there."""
    for stage in ZERO:
        changes = (PHASES, f"zero_stage={stage}")
        alone.train(config, "whole", run / f"whole-{stage}", done, *changes)
        try:
            alone.train(config, "whole", run / f"resumed-{stage}", done, *changes, stop_at=1 + STOPPED)
        except Interrupted:
            barrier()
        else:
            raise AssertionError("it was not stopped")
        alone.train(config, "whole", run / f"resumed-{stage}", done, *changes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
