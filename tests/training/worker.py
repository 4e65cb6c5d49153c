"""One of several processes that train together: what torchrun starts in the tests."""

import json
import os
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from instaflow.errors import Interrupted
from instaflow.files import write_json
from instaflow.interruption import listening
from instaflow.training.loop import train
from instaflow.world import leave, world
from tests.training.made import Fit, batch, folder_of, job_of


def main(run: Path, seconds_per_batch: float) -> None:
    rank = world().rank

    def slow_batch(position: int, size: int) -> tuple:
        time.sleep(seconds_per_batch)
        return batch(position, size)

    outcome = {"rank": rank}
    with listening() as stop:
        write_json(run / f"listening-{rank}.json", {"pid": os.getpid()})
        try:
            job = job_of(Fit(), batch=slow_batch, micro_batch_size=1)
            trained = train(job, folder_of(run), stop)
            if world().leads:
                save_file(trained.raw, run / "raw.safetensors")
                save_file(trained.ema, run / "ema.safetensors")
        except Interrupted as error:
            outcome |= {"message": error.message, "heard": stop.signal}
    (run / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
