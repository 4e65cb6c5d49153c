"""A small experiment with a stage of every kind, and stages marked done without their work."""

from pathlib import Path

from instaflow.config import load_experiment
from instaflow.files import fingerprint_of, write_file
from instaflow.rundir import StageFolder, locked, stage_folders

PHASE = "{samples: 8, global_batch_size: 4, learning_rate: 1e-3}"
SMALL = f"""
run: runs/small
stages:
  teacher: {{kind: teacher, data: digits, guidance_scale: 2, phases: [{PHASE}], autoencoder_phases: [{PHASE}]}}
  pairs: {{kind: couple, model: teacher, prompts: [a seven, the digit 7], count: 8, guidance_scale: 1.5}}
  2rf: {{kind: reflow, init: teacher, couplings: pairs, phases: [{PHASE}, {PHASE}]}}
  student: {{kind: distill, init: 2rf, couplings: pairs, phases: [{PHASE}]}}
  report:
    kind: evaluate
    protocol: digits
    models: [{{model: teacher, num_steps: [25, 1]}}, {{model: student, num_steps: [1]}}]
    reference: {{model: teacher, num_steps: 25}}
"""
HALVED = """
  halved:
    {kind: distill, method: progressive, init: teacher, couplings: pairs, guidance_scale: 2,
     phases: [{num_steps: 2, samples: 8, global_batch_size: 4, learning_rate: 1e-3},
              {num_steps: 1, samples: 8, global_batch_size: 4, learning_rate: 1e-3}]}
"""
"""Another stage of SMALL."""


def write(folder: Path, text: str = SMALL, name: str = "small.yaml") -> str:
    """An experiment file; returns its path as a user would type it."""
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def folders(config: str, *overrides: str, run: Path | None = None) -> dict[str, StageFolder]:
    return stage_folders(load_experiment(config, overrides, str(run) if run else None))


def mark_done(stage: StageFolder, payload: str = "weights", **facts: object) -> None:
    """What a stage leaves behind when it ends, with `payload` for its work."""
    with locked(stage.folder):
        stage.begin()
        stage.model.mkdir(exist_ok=True)
        write_file(stage.model / "weights.txt", payload)
        stage.log(loss=0.5)
        stage.finish(fingerprint_of(stage.model), **facts)
