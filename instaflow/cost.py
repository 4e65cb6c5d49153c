"""What a stage costs, as arithmetic: bytes on disk, bytes that a GPU holds, GPU-days.

What its networks need is handed in.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from instaflow.sections import Keep, Phase
from instaflow.stages import CoupleStage, TrainingStage

# --- GPUs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """Floating-point operations a second of matrix products without sparsity, as its datasheet says."""

    name: str
    half: float  # in bfloat16 or float16
    single: float  # in float32
    memory: float  # bytes


GPUS = (
    GPU("A100", 312e12, 19.5e12, 80e9),
    GPU("H100", 989e12, 67e12, 80e9),
    GPU("H200", 989e12, 67e12, 141e9),
    GPU("L40S", 362e12, 91.6e12, 48e9),
    GPU("RTX 4090", 165e12, 82.6e12, 24e9),
)
UTILIZATION = 0.3
"""The share of the datasheet's rate that is taken for granted; an assumption, until benchmarks/ has measured one."""


def gpu_days(flops: float, gpu: GPU, *, half: bool, utilization: float) -> float:
    """Days of one GPU that computes in half precision, or else in float32."""
    return flops / ((gpu.half if half else gpu.single) * utilization) / 86400


PAPER_DAYS = {
    "couple": 16 / (3_200_000 * 25 * 2),  # a call of the network: 3.2M pairs, 25 steps, two calls each under guidance
    "reflow": (11.2 + 64) / (70_000 * 64 + 25_000 * 1024),  # a sample
    "distill": 54.4 / (21_500 * 1024),  # a sample, by L2
    "distill by LPIPS": 53.6 / (18_000 * 1024),
}
"""A100-days that InstaFlow says it took with Stable Diffusion's U-Net (arXiv 2309.06380; the model card's table, which
adds up to 199.2)."""


# --- disk -------------------------------------------------------------------------------------------------------------

TAR_BLOCK, TAR_RECORD = 512, 10240
NPY_HEADER = 128
IMAGE_BYTES = {"webp": 0.32, "png": 1.76}
"""A pixel, of photographs: the larger of the two that docs/couplings.md tells of."""


@dataclass(frozen=True)
class Record:
    """The shapes of what a couple stage writes for one prompt."""

    latent: tuple[int, int, int]  # (C, H, W)
    image: tuple[int, int]  # (H, W) in pixels
    embedding: tuple[int, int]  # (L, D)
    pooled: int  # P; 0 where there is none

    def bytes(self, keep: Keep | None) -> int:
        """In a tar, with a prompt that takes no more than a block, but without the image that some records keep."""
        channels, height, width = self.latent
        state = 2 * channels * height * width
        sizes = [TAR_BLOCK, *[NPY_HEADER + state] * 2]
        if keep and keep.embeddings:
            sizes += [NPY_HEADER + 2 * size for size in (self.embedding[0] * self.embedding[1], self.pooled) if size]
        if keep and keep.trajectory:
            sizes.append(NPY_HEADER + len(keep.trajectory) * state)
        return sum(TAR_BLOCK + rounded_up(size, TAR_BLOCK) for size in sizes)

    def image_bytes(self, keep: Keep | None) -> int:
        """The image of a record that keeps one, about."""
        if keep is None or keep.images is None:
            return 0
        return TAR_BLOCK + rounded_up(int(IMAGE_BYTES[keep.images.format] * self.image[0] * self.image[1]), TAR_BLOCK)


def shards_bytes(settings: CoupleStage, record: Record) -> int:
    """All tars of a couple stage."""
    whole, rest = divmod(settings.count, settings.records_per_shard)

    def tar(records: int) -> int:
        return rounded_up(records * record.bytes(settings.keep) + 2 * TAR_BLOCK, TAR_RECORD) if records else 0

    kept = settings.keep.images if settings.keep else None
    images = -(-settings.count // kept.every) if kept else 0
    return whole * tar(settings.records_per_shard) + tar(rest) + images * record.image_bytes(settings.keep)


def checkpoint_bytes(settings: TrainingStage, parameters: int) -> int:
    """One checkpoint of so many trained parameters: weights and average in float32, and AdamW's two moments."""
    return 2 * 4 * parameters + moments_bytes(settings, parameters)


def num_checkpoints(settings: TrainingStage, phases: Sequence[Phase]) -> int:
    """How many checkpoints a training leaves behind."""
    saved = checkpoint_positions(phases, settings.checkpoint_every)
    old, every = saved[: -settings.keep_checkpoints], settings.keep_checkpoint_every
    return min(settings.keep_checkpoints, len(saved)) + (len({place // every for place in old} - {0}) if every else 0)


def checkpoint_positions(phases: Sequence[Phase], every: int) -> list[int]:
    """The samples seen at each checkpoint of a training that nobody stops."""
    positions, position, saved = [], 0, 0
    for phase in phases:
        for _ in range(phase.updates):
            position += phase.global_batch_size
            if position - saved >= every:
                saved = position
                positions.append(saved)
    return positions if saved == position else [*positions, position]


def rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# --- memory -----------------------------------------------------------------------------------------------------------

BUCKET = 500_000_000
"""Numbers that DeepSpeed gathers before the processes exchange them (its `reduce_bucket_size`), under ZeRO."""
LIVE = 1_000_000_000
"""Gathered weights that ZeRO 3 holds at a time, at most (DeepSpeed's `stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one GPU holds while a stage trains, or samples."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0  # AdamW's moments, and under ZeRO the float32 weights that it steps
    average: int = 0
    frozen: int = 0  # networks that are not trained
    buckets: int = 0
    activations: int = 0  # and what else is alive at the highest moment of a micro batch

    @property
    def total(self) -> int:
        return sum(astuple(self))


def training_memory(settings: TrainingStage, parameters: int, *, frozen: int, activations: int, gpus: int) -> Memory:
    """What one of `gpus` GPUs holds as the stage's ZeRO stage shares it out.

    `parameters` are trained, `frozen` are not; all weights, gradients and averages are float32 (4 bytes). `activations`
    are bytes of one micro batch.
    """
    stage = settings.zero_stage
    part = -(-parameters // gpus)
    own = part if stage else parameters  # what this GPU's optimizer steps
    stepped = 4 * own if stage else 0  # a float32 copy
    on_cpu = settings.offload_optimizer
    return Memory(
        weights=4 * part + 4 * min(parameters, LIVE) if stage == 3 else 4 * parameters,
        gradients=4 * (part if stage >= 2 else parameters),
        optimizer=0 if on_cpu else stepped + moments_bytes(settings, own),
        average=0 if on_cpu else 4 * own,
        frozen=4 * frozen,
        buckets=4 * BUCKET if stage else 0,
        activations=activations,
    )


def moments_bytes(settings: TrainingStage, parameters: int) -> int:
    """AdamW's two moments of so many parameters; 256 that are kept in 8 bits share a float32 scale."""
    return 2 * (parameters + 4 * (parameters // 256)) if settings.optimizer == "adamw-8bit" else 2 * 4 * parameters
