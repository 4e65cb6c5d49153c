"""Bytes and days as arithmetic, against values worked out by hand."""

import pytest

from instaflow.cost import (
    BUCKET,
    GPUS,
    LIVE,
    PAPER_DAYS,
    Record,
    checkpoint_bytes,
    checkpoint_positions,
    gpu_days,
    num_checkpoints,
    training_memory,
)
from instaflow.sections import Keep, Phase
from instaflow.stages import TrainingStage

SD1 = Record(latent=(4, 64, 64), image=(512, 512), embedding=(77, 768), pooled=0)
XL = Record(latent=(4, 128, 128), image=(1024, 1024), embedding=(77, 2048), pooled=1280)
PHASES = [Phase(samples=100, global_batch_size=8, learning_rate=1e-3)]
PHASES += [Phase(samples=64, global_batch_size=32, learning_rate=1e-3)]


def training(**settings):
    return TrainingStage(phases=PHASES, **settings)


def memory(gpus=1, parameters=1000, **settings):
    return training_memory(training(**settings), parameters, frozen=10, activations=7, gpus=gpus)


def test_without_zero_every_gpu_holds_everything():
    found = memory(gpus=4)
    assert (found.weights, found.gradients, found.optimizer, found.average) == (4000, 4000, 8000, 4000)
    assert (found.frozen, found.buckets, found.activations) == (40, 0, 7)
    assert found.total == 20 * 1000 + 40 + 7
    assert memory(gpus=1) == found


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"),
    [(1, 4000, 4000), (2, 4000, 1000), (3, 1000 + 4000, 1000)],  # stage 3 gathers the others' parts as it needs them
)
def test_zero_shares_out_what_its_stage_says(stage, weights, gradients):
    found = memory(gpus=4, zero_stage=stage)
    assert (found.weights, found.gradients) == (weights, gradients)
    assert (found.optimizer, found.average) == (3 * 1000, 1000)  # a float32 copy and two moments of a quarter
    assert found.buckets == 4 * BUCKET


def test_the_weights_that_zero_3_gathers_have_a_bound():
    assert memory(gpus=1000, parameters=5 * LIVE, zero_stage=3).weights == 4 * (5 * LIVE // 1000 + LIVE)


def test_moments_of_8_bits():
    found = memory(parameters=256_000, optimizer="adamw-8bit")
    assert found.optimizer == 2 * (256_000 + 4 * 1000) and found.weights == 4 * 256_000
    saved = [checkpoint_bytes(training(optimizer=optimizer), 256_000) for optimizer in ("adamw", "adamw-8bit")]
    assert saved == [16 * 256_000, 8 * 256_000 + found.optimizer]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_offloaded_is_on_no_gpu(stage):
    kept, offloaded = (memory(gpus=2, zero_stage=stage, offload_optimizer=on) for on in (False, True))
    assert kept.total - offloaded.total == (4 + 8 + 4) * 500
    assert offloaded.optimizer == offloaded.average == 0


def test_a_record_is_what_the_readme_says_of_it():
    pair = SD1.bytes(None)
    assert 64 * 1024 < pair < (64 + 4) * 1024
    assert SD1.bytes(Keep(embeddings=True)) - pair == pytest.approx(116 * 1024, rel=0.01)
    assert XL.bytes(Keep(embeddings=True)) - XL.bytes(None) == pytest.approx(312 * 1024, rel=0.01)
    assert SD1.bytes(Keep(trajectory=[0.25, 0.5])) - pair == pytest.approx(2 * 32 * 1024, rel=0.02)
    assert XL.bytes(None) == pytest.approx(4 * pair, rel=0.05)
    assert SD1.image_bytes(Keep(images={"every": 10})) == pytest.approx(81 * 1024, rel=0.02)
    assert SD1.image_bytes(Keep(images={"every": 10, "format": "png"})) == pytest.approx(451 * 1024, rel=0.02)
    assert SD1.image_bytes(Keep(embeddings=True)) == 0


def test_checkpoints_fall_where_training_saves_them():
    assert checkpoint_positions(PHASES, 1000) == [160]
    assert checkpoint_positions(PHASES, 30) == [32, 64, 96, 128, 160]
    assert checkpoint_positions(PHASES[:1], 30) == [32, 64, 96]  # twelve batches of 8; four samples are left over


@pytest.mark.parametrize(
    ("keep", "every", "expected"), [(2, None, 2), (9, None, 5), (1, 64, 2 + 1), (1, 32, 4 + 1), (3, 96, 3)]
)
def test_as_many_checkpoints_stay_as_the_settings_say(keep, every, expected):
    stage = training(checkpoint_every=30, keep_checkpoints=keep, keep_checkpoint_every=every)
    assert num_checkpoints(stage, PHASES) == expected


def test_days_follow_from_rate_and_share():
    a100 = GPUS[0]
    assert gpu_days(312e12 * 86400, a100, half=True, utilization=1) == 1
    assert gpu_days(312e12 * 86400, a100, half=True, utilization=0.25) == 4
    assert gpu_days(312e12 * 86400, a100, half=False, utilization=1) == 16


def test_the_papers_days_add_up_to_its_own_sum():
    couplings = PAPER_DAYS["couple"] * 3_200_000 * 50
    reflow = PAPER_DAYS["reflow"] * (70_000 * 64 + 25_000 * 1024)
    distillation = PAPER_DAYS["distill"] * 21_500 * 1024
    assert couplings + reflow + distillation + 53.6 == pytest.approx(199.2)
