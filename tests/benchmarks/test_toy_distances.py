import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks import toy_distances
from instaflow.toy import demonstration

ROOT = Path(__file__).parents[2]


def test_the_toy_s_page_tells_what_was_measured():
    page = " ".join((ROOT / "docs/dmd-toy/README.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "benchmarks/results/toy-distances.json").read_text(encoding="utf-8"))["settings"]
    same, halved, quartered, fast = found.values()
    assert list(found) == list(toy_distances.SETTINGS)
    assert same["covered"] == [4] * 8 and same["far"] == 0
    assert f"halved, the same training without regression covers the far mode in {halved['far']} of 8 seeds" in page
    assert quartered["covered"] == [5] * 8 and "with a quarter of them every mode in all 8" in page
    assert f"With both learning rates doubled it found the far mode in {fast['far']} of 8" in page


def test_each_setting_is_trained_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "STARTING_SAMPLES", 2**9)
    monkeypatch.setattr(toy_distances, "MATCHING_STEPS", 2)
    done = CliRunner().invoke(toy_distances.main, ["--seeds", "2", "--output", str(tmp_path / "result.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert [value["size"] for value in result["settings"].values()] == [1.0, 0.5, 0.25, 1.0]
    for name, value in result["settings"].items():
        assert [len(shares) for shares in value["shares"]] == [5, 5]
        assert value["covered"] == [sum(share >= 0.04 for share in shares) for shares in value["shares"]]
        assert value["far"] == sum(shares[-1] >= 0.04 for shares in value["shares"])
        assert f"{name}: the far mode in {value['far']} of 2 seeds" in done.output
