"""The tables of a plan: what each stage costs, what its memory is made of, and the days it takes."""

from dataclasses import dataclass, field

from instaflow.config import Experiment
from instaflow.cost import GPUS, UTILIZATION, Memory, gpu_days


@dataclass(frozen=True)
class Cost:
    """What one stage costs."""

    name: str
    kind: str
    pairs: int = 0
    samples: int = 0  # that a network is trained on, an epoch after the other, or that are drawn for the report
    flops: float = 0
    disk: int = 0  # bytes that stay
    while_saving: int = 0  # and that come and go with a checkpoint
    memory: Memory = field(default_factory=Memory)
    half: bool = False
    """Whether the network computes in half precision."""
    critic: bool = False
    """Whether a fake score is trained beside the network."""
    paper_days: float | None = None
    """A100-days that InstaFlow took for as much."""


def table_of_stages(experiment: Experiment, costs: list[Cost], gpus: int) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "kind", "pairs", "samples", "FLOPs", "disk", "a GPU holds")]
    for cost in costs:
        counts = [f"{count:,}" if count else "" for count in (cost.pairs, cost.samples)]
        disk = sized(cost.disk) if cost.disk else ""
        rows.append((cost.name, cost.kind, *counts, power(cost.flops), disk, sized(cost.memory.total)))
    pairs, samples = (sum(getattr(cost, key) for cost in costs) for key in ("pairs", "samples"))
    total = [power(sum(cost.flops for cost in costs)), sized(sum(cost.disk for cost in costs))]
    most = sized(max(cost.memory.total for cost in costs))
    rows.append(("total", "", f"{pairs:,}", f"{samples:,}", *total, f"{most} at most"))
    saving = max(cost.while_saving for cost in costs)
    notes = [
        "Samples are those that networks are trained on, or that the report draws. A backward pass counts",
        "as two forward ones. Disk: shards, two model folders a training, the checkpoints that are kept.",
    ]
    if saving:
        notes.append(f"While a checkpoint is written, {sized(saving)} more.")
    stages = f"{len(costs)} stages" if len(costs) > 1 else "one stage"
    return [f"{experiment.source}: {stages}, on {devices(gpus)}", "", *aligned(rows, 2), "", *indented(notes)]


def table_of_memory(costs: list[Cost], gpus: int) -> list[str]:
    """What the memory is made of, stage by stage."""
    parts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "AdamW",
        "average": "average",
        "frozen": "frozen",
        "buckets": "DeepSpeed",
        "activations": "activations",
    }
    held = [key for key in parts if any(getattr(cost.memory, key) for cost in costs)]
    rows = [("stage", *(parts[key] for key in held))]
    for cost in costs:
        sizes = [getattr(cost.memory, key) for key in held]
        rows.append((cost.name, *(sized(size) if size else "" for size in sizes)))
    notes = [
        "Activations are counted tensor by tensor over one micro batch, as a CPU runs it. Not counted:",
        "what CUDA, cuDNN and NCCL take for themselves, and memory lost between blocks.",
    ]
    if any(cost.critic for cost in costs):
        notes += [
            "Of a stage by method dmd, weights, gradients, AdamW and average are those of two networks, the",
            "generator and its fake score, which are trained side by side.",
        ]
    which = "the GPU" if gpus == 1 else f"each of the {gpus} GPUs"
    return [f"What {which} holds at the highest moment", "", *aligned(rows, 1), "", *indented(notes)]


def table_of_days(costs: list[Cost], gpus: int, utilization: float | None) -> list[str]:
    """GPU-days by the datasheets, and beside them InstaFlow's own."""
    share = UTILIZATION if utilization is None else utilization
    paper = any(cost.paper_days for cost in costs)
    days = {gpu.name: [gpu_days(cost.flops, gpu, half=cost.half, utilization=share) for cost in costs] for gpu in GPUS}
    if not any(of_days(sum(values)) != of_days(0) for values in days.values()):
        return [f"GPU-days: {of_days(0)} on any of {', '.join(days)}"]
    rows = [("stage", "computes in", *days, *(["InstaFlow, A100"] if paper else []))]
    for row, cost in enumerate(costs):
        told = [of_days(cost.paper_days) if cost.paper_days else ""] if paper else []
        precision = "16 bits" if cost.half else "float32"
        rows.append((cost.name, precision, *(of_days(values[row]) for values in days.values()), *told))
    whole = all(cost.paper_days for cost in costs)  # a part of the sum would read as all of it
    told = [of_days(sum(cost.paper_days or 0 for cost in costs)) if whole else ""] if paper else []
    rows.append(("total", "", *(of_days(sum(values)) for values in days.values()), *told))
    if gpus > 1:
        spread = [of_days(sum(values) / gpus) for values in days.values()]
        rows.append((f"on {gpus} of them", "", *spread, *([""] if paper else [])))
    notes = []
    for gpu in GPUS:
        if large := [cost.name for cost in costs if cost.memory.total > gpu.memory]:
            notes.append(f"Too large for the {gpu.memory / 1e9:.0f} GB of {gpu.name}: {', '.join(large)}")
    notes += ["The rate is that of dense matrix products in a stage's precision; for float32 without TF32."]
    if gpus > 1:
        notes.append("Several GPUs divide the days by their number only where nothing is lost between them.")
    if paper and not whole:
        notes.append("Where none of InstaFlow's days stand, its authors trained nothing by that method or loss.")
    if paper:
        notes += [
            "InstaFlow's A100-days are the paper's own for as many samples, or calls of the network (arXiv",
            "2309.06380: 16 for couplings, 75.2 for reflow, 54.4 and by another loss 53.6 for distillation).",
        ]
    said = f"GPU-days, at {share:.0%} of the datasheet's rate"
    said += ", which is an assumption: no GPU was measured yet" if utilization is None else ""
    return [said, "", *aligned(rows, 2), "", *indented(notes)]


def aligned(rows: list[tuple[str, ...]], texts: int) -> list[str]:
    """Rows of a table: so many columns of text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def devices(gpus: int) -> str:
    return "one GPU" if gpus == 1 else f"{gpus} GPUs"


def power(number: float) -> str:
    """1.3e+20 as 1.3e20."""
    return f"{number:.1e}".replace("e+", "e")


def sized(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:,.{1 if size < 99.95 else 0}f} {unit}"
    return f"{size / 1000:,.1f} TB"


def of_days(days: float) -> str:
    return "< 0.01" if days < 0.01 else f"{days:,.{2 if days < 9.995 else 1}f}"
