import numpy as np
import pytest

from instaflow.evaluation.trajectories import project


def test_straight_paths_stay_straight_and_a_bend_is_seen():
    rng = np.random.default_rng(0)
    noise, data = rng.standard_normal((2, 5, 4, 8, 8))
    times = np.linspace(0, 1, 11).reshape(1, 11, 1, 1, 1)
    straight = noise[:, None] * (1 - times) + data[:, None] * times
    bent = straight + np.sin(np.pi * times) * noise.mean(axis=0)
    drawn = {one.model: np.array(one.paths) for one in project({"straight": straight, "bent": bent})}
    chord = {m: p[:, :1] + np.linspace(0, 1, 11)[None, :, None] * (p[:, -1:] - p[:, :1]) for m, p in drawn.items()}
    assert drawn["straight"].shape == (5, 11, 2)
    assert np.abs(drawn["straight"] - chord["straight"]).max() < 1e-9
    assert np.abs(drawn["bent"] - chord["bent"]).max() > 0.1


def test_points_of_a_plane_keep_their_distances_and_the_main_direction_comes_first():
    rng = np.random.default_rng(1)
    flat = rng.standard_normal((3, 7, 2)) * [5.0, 1.0]
    turned = flat @ np.linalg.qr(rng.standard_normal((20, 2)))[0].T
    drawn = np.array(project({"one": turned})[0].paths).reshape(-1, 2)
    flat = flat.reshape(-1, 2)
    assert np.allclose(
        np.linalg.norm(drawn[:, None] - drawn, axis=-1), np.linalg.norm(flat[:, None] - flat, axis=-1), atol=1e-9
    )
    assert drawn[:, 0].var() == pytest.approx(np.linalg.eigvalsh(np.cov(flat.T, bias=True))[1])
