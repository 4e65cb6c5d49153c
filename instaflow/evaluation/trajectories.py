"""The paths of several models, laid into one plane that a page can draw."""

from collections.abc import Mapping

import numpy as np

from instaflow.evaluation.report import Trajectories


def project(paths: Mapping[str, np.ndarray]) -> list[Trajectories]:
    """The paths of every model in one common plane, ready for `Report.trajectories`.

    paths: model's name -> [K, T + 1, ...], K noises, the same in every model, each followed from noise to data.
    The plane is spanned by the two main directions of all points together. A projection keeps straight lines
    straight and even spacing even, so that a bend seen in the plane is a bend of the path.
    """
    flat = {model: np.asarray(p, dtype=np.float64).reshape(*np.shape(p)[:2], -1) for model, p in paths.items()}
    points = np.concatenate([p.reshape(-1, p.shape[-1]) for p in flat.values()])  # [all, D]
    centre = points.mean(axis=0)
    plane = np.linalg.svd(points - centre, full_matrices=False)[2][:2].T  # [D, 2], main direction first
    plane = plane * np.where(plane[np.abs(plane).argmax(axis=0), [0, 1]] < 0, -1, 1)  # its sign is arbitrary
    return [
        Trajectories(model=model, paths=[[(float(x), float(y)) for x, y in path] for path in (p - centre) @ plane])
        for model, p in flat.items()
    ]
