"""What a report's row says: its figures with their intervals, its card, and in which circumstances it was made."""

import math
from collections.abc import Sequence

from instaflow.evaluation.report import Row
from instaflow.evaluation.wording import duration, is_number, number, percent, steps

SHARES = ("prompt_accuracy", "prompt_accuracy_unseen", "precision", "recall")
TO_TEACHER = ("frechet_distance_teacher", "pixel_gap", "perceptual_gap")
"""Those that are 0 of the reference itself, which says nothing of its quality."""
PER_THOUSAND = ("kernel_distance",)
"""Figures so small that they are read a thousandfold."""

PERCENT = "\N{NO-BREAK SPACE}%"
CARD_HEADS = ("Content", "Weights", "Steps", "Guidance", "Scheduler", "Precision", "Training samples", "Device-hours")


def told(row: Row, figure: str) -> str:
    """A figure as it is read, with half of its interval where that is known: 0.519 ± 0.12, 99.55 ± 0.29 %.

    It has no fewer digits than without: two rows differ by less chance than each of them has.
    """
    value, half = getattr(row, figure), row.intervals.get(figure)
    if is_itself(row, figure):
        return "itself"
    if figure == "seconds_per_image":
        return duration(value)
    if figure in PER_THOUSAND:
        return number(None if value is None else 1000 * value)
    return said(value, half, share=figure in SHARES)


def is_itself(row: Row, figure: str) -> bool:
    """Whether a row is what the figure compares with."""
    return figure in TO_TEACHER and getattr(row, figure) == 0


def said(value: float | None, half: float | None, *, share: bool = False) -> str:
    alone = percent(value) if share else number(value)
    if value is None or half is None or not is_number(value) or not is_number(half):
        return alone
    scale, unit = (100, PERCENT) if share else (1, "")
    width = scale * half
    decimals = max(1 - math.floor(math.log10(width)), 0) if width else 0
    digits = max(decimals, len(alone.removesuffix(unit).partition(".")[2]))
    return f"{scale * value:,.{digits}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{width:,.{decimals}f}{unit}"


def parted(text: str) -> tuple[str, str]:
    """(0.519, 0.12) of 0.519 ± 0.12, (99.55 %, 0.29) of 99.55 ± 0.29 %; the second empty where there is no ±."""
    value, _, half = text.partition("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    unit = PERCENT if half.endswith(PERCENT) else ""
    return value + unit, half.removesuffix(unit)


def spread(rows: Sequence[Row]) -> str:
    """What ± is, where there is any."""
    if not any(row.intervals for row in rows):
        return ""
    return (
        "±: half of the figure’s 95\N{NO-BREAK SPACE}% interval over prompts and noise, for these weights and these "
        "real images; of another training seed it says nothing, for which instaflow compare is there."
    )


def card_told(row: Row) -> list[str]:
    """What a row was, by CARD_HEADS: its model's content, how it was sampled, in what precision, and what it cost."""
    card, cost = row.card, row.cost or {}
    samples, hours = cost.get("training_samples"), cost.get("device_hours")
    return [
        " ".join(word[:16] for word in str(card.get("model_content", "–")).split()),
        row.weights,
        str(row.num_steps),
        "–" if row.guidance_scale is None else f"{row.guidance_scale:g}",
        str(card.get("sampler", "–")),
        str(card.get("dtype", "–")),
        f"{samples:,}" if samples else "–",
        "–" if hours is None else number(hours),
    ]


def circumstances(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(whose, in which circumstances they were made), each once; whose is "Made on" where all are the same."""
    found: dict[str, list[str]] = {}
    for row in rows:
        card, parts = row.card, []
        if "hardware" in card:
            parts += [card["hardware"], f"batches of {card['batch_size']}", f"processes: {card['processes']}"]
        parts.append(", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items()))
        found.setdefault("; ".join(filter(None, parts)), []).append(f"{row.label}, {steps(row.num_steps)}")
    whose = {text: "Made on" if len(found) == 1 else "; ".join(dict.fromkeys(names)) for text, names in found.items()}
    return [(whose[text], text) for text in found if text]
