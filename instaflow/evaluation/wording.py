"""Figures as a reader wants to see them, always in the same form; number and unit stay on one line."""

import math


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Three significant digits, no exponent: 0.0312, 0.312, 6.41, 23.4, 1,234; a dash for no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    rounded = float(f"{value:.2e}")  # so that 0.9996 is 1.00
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}" if decimals else f"{value:,.0f}"


def percent(share: float | None) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if share is not None and math.isfinite(share) else "–"


def duration(seconds: float | None) -> str:
    """3.42 ms, 1.70 s, 48 s, 5 min 12 s, 2 h 05 min, 3.1 days."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{number(1000 * seconds)}\N{NO-BREAK SPACE}ms"
    if seconds < 10:
        return f"{number(seconds)}\N{NO-BREAK SPACE}s"
    if seconds < 59.5:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    minutes = round(seconds / 60)
    if seconds < 3599.5:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s".replace(" ", "\N{NO-BREAK SPACE}")
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{seconds / 86400:.1f}\N{NO-BREAK SPACE}days"


def memory(size: float | None) -> str:
    """Bytes as GB (10⁹), or MB below one."""
    if size is None or not math.isfinite(size):
        return "–"
    return f"{number(size / 1e9)}\N{NO-BREAK SPACE}GB" if size >= 1e9 else f"{number(size / 1e6)}\N{NO-BREAK SPACE}MB"


def times(ratio: float) -> str:
    """1.4 times, 21 times."""
    return f"{ratio:.1f}\N{NO-BREAK SPACE}times" if ratio < 9.95 else f"{ratio:,.0f}\N{NO-BREAK SPACE}times"


def named(model: str) -> str:
    """A model's name, marked as one for the page's paragraphs."""
    return f"`{model.replace('`', '')}`"


def steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def joined(names: list[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plus_minus(mean: float | None, half: float | None, *, scale: float = 1.0) -> str:
    """0.3081 ± 0.0042: `scale` times both, with two significant digits of the half width; the mean alone without."""
    if not is_number(mean):
        return "–"
    value = scale * mean  # type: ignore[operator]
    if half is None or not math.isfinite(half):
        return number(value)
    width = scale * half
    if not width:
        return f"{number(value)}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0"
    decimals = min(max(1 - math.floor(math.log10(float(f"{width:.1e}"))), 0), 5)
    return f"{value:,.{decimals}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{width:,.{decimals}f}"
