"""What a report takes from the folders of the stages before it."""

from instaflow.evaluation.history import loss_curves, preview_curves, stages_so_far
from tests.experiments import folders, mark_done, write


def test_losses_and_previews_are_told_apart(tmp_path):
    stages = folders(write(tmp_path), run=tmp_path / "run")
    for name in ("teacher", "pairs", "2rf", "student"):
        mark_done(stages[name])
    for seen, distance in ((64, 0.7), (128, None), (192, 0.5)):  # None: a latent was not finite
        stages["2rf"].log(job="", samples_seen=seen, loss=2.0)
        frechet = None if distance is None else distance / 2
        stages["2rf"].log(job="", samples_seen=seen, preview_distance=distance, preview_frechet=frechet)
    for name in ("teacher", "2rf", "student"):
        stages[name].forget_stats(lambda line: "job" in line)
    done = stages_so_far(stages["report"])
    (curve,) = preview_curves(stages["report"], done)
    assert (curve.stage, curve.samples_seen) == ("2rf", [64, 192])
    assert (curve.distance, curve.frechet_distance) == ([0.7, 0.5], [0.35, 0.25])
    (losses,) = loss_curves(stages["report"], done)
    assert (losses.samples_seen, losses.loss) == ([64, 128, 192], [2.0, 2.0, 2.0])
