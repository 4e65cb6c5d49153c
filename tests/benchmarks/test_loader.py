"""The benchmark of the loader runs, with few records."""

from pathlib import Path

from tests.benchmarks.programs import run


def test_it_reads_from_every_count_of_records(tmp_path: Path) -> None:
    counts = ["--records", "80", "--records", "1000"]
    words = [*counts, "--records-per-shard", "16", "--shards", "4", "--batch-size", "8", "--training-rate", "2"]
    said, result = run("loader", words, tmp_path)
    assert said.count("records/s") == 2 and said.count("times the training's") == 2
    assert [row["records"] for row in result["counts"]] == [80, 1000]
    for row in result["counts"]:
        assert row["records_per_second"] > 0 and row["seconds_to_open"] > 0
        assert 20 < row["peak_memory_mib"] < 1000
