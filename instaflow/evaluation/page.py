"""The report as one self-contained HTML page."""

from pathlib import Path

from instaflow.evaluation.report import Report


def write_page(path: Path, report: Report) -> None:
    """Write `report` to `path`: one file that needs no network and no script, the same bytes for the same report."""
    raise NotImplementedError
