"""The benchmark of couplings runs."""

from pathlib import Path

from tests.benchmarks.programs import run


def test_it_prints_every_rate_and_its_ratio(tmp_path: Path) -> None:
    said, result = run("couple", ["--batch-size", "2", "--num-steps", "2", "--rounds", "3"], tmp_path)
    assert said.count("pairs/s") == 3 and said.count("times stock") == 2
    assert all(len(seconds) == 3 for seconds in result["seconds"].values())
    for name in ("ours", "compiled"):
        pairs = zip(result["seconds"][name], result["seconds"]["stock"], strict=True)
        assert result["ratio"][name] == sorted(theirs / own for own, theirs in pairs)[1]
