import json

import pytest

from instaflow.couplings.description import describe
from instaflow.couplings.records import Kept, KeptImages
from instaflow.couplings.shards import sidecar_path, tar_path
from tests.couplings.made import PROMPTS, make_couplings, manifest_of, sample


def facts(folder, manifest):
    """The lines before the table, by their names; and the table's rows."""
    name, *lines = describe(folder, manifest)
    assert name == str(folder)
    end = lines.index("")
    return dict(line.split(maxsplit=1) for line in lines[:end]), [line.split() for line in lines[end + 2 :]]


def test_it_tells_what_made_the_couplings_and_how_many_there_are(tmp_path):
    manifest = manifest_of(
        timestep_spacing="trailing",
        guidance_scale=4.5,
        compiled=True,
        model_fingerprint="owner/name@" + "c0ffee" * 7,
        hardware={"name": "NVIDIA H200", "torch": "2.15.0"},
        keep=Kept(images=KeptImages(every=1000, format="webp", size=(512, 768)), trajectory=(0.25, 0.5)),
    )
    folder = make_couplings(tmp_path / "pairs", manifest_of())
    (folder / "stats.jsonl").write_text(
        "".join(
            json.dumps({"shard": shard, "count": 5, "left_out": 0, "seconds": 0.5 * shard}) + "\n"
            for shard in (1, 2, 4)
        )
    )
    told, rows = facts(folder, manifest)
    size = sum(tar_path(folder, shard).stat().st_size for shard in range(5))
    assert told["model"] == "teacher (commit c0ffeec0ffee)"
    assert told["sampler"] == "DPMSolverMultistepScheduler, 25 steps, trailing spacing, guidance 4.5"
    assert told["computed"] == "in float32, compiled, batches of 2"
    assert told["hardware"] == "NVIDIA H200, torch 2.15.0"
    assert told["noise"] == "seed 0, stage 'pairs'"
    assert told["prompts"].startswith(f"{len(PROMPTS)} (") and "NOT" not in told["prompts"]
    assert told["records"] == (
        "noise, latent and prompt; float16 2×4×4; an image of every 1,000, webp, 768×512; "
        "states of the path at 0.25, 0.5"
    )
    assert told["shards"] == "5 of 5, 23 couplings"
    assert told["size"] == f"{size / 1e6:.1f} MB, {size / 23 / 1024:.1f} KiB a coupling"
    assert told["time"] == "2 s, 7.5 couplings/s"
    assert rows == [[f"0000{shard}", "1", str(5 if shard < 4 else 3), "0", "0.0"] for shard in range(5)]


def test_what_is_missing_left_out_or_damaged_is_told(tmp_path):
    def sampled(noise, prompts):
        latents = sample(noise, prompts)
        latents[[not prompt for prompt in prompts]] = float("nan")
        return latents

    folder = make_couplings(tmp_path / "pairs", manifest_of(), sampled)
    sidecar_path(folder, 1).unlink()
    sidecar_path(folder, 3).write_text("{")
    (folder / "prompts.json").write_text('[\n"another"\n]\n')
    told, rows = facts(folder, manifest_of())
    assert told["shards"] == "3 of 5, 10 couplings; 1 with a damaged sidecar, which instaflow verify names"
    assert told["prompts"].startswith("1 (") and told["prompts"].endswith("NOT those of the manifest")
    assert "time" not in told
    assert [row[1:4] for row in rows] == [list(row) for row in ("141", "000", "141", "000", "121")]
    (folder / "prompts.json").unlink()
    assert "cannot be read" in facts(folder, manifest_of())[0]["prompts"]


@pytest.mark.parametrize(("count", "names"), [(40, 8), (45, 5), (85, 6)])
def test_many_shards_are_told_in_ranges(tmp_path, count, names):
    manifest = manifest_of(count=count)
    folder = make_couplings(tmp_path / "pairs", manifest)
    _, rows = facts(folder, manifest)
    assert len(rows) == names and sum(int(row[2]) for row in rows) == count
    assert sum(int(row[1]) for row in rows) == manifest.plan.num_shards
    if count == 85:
        assert rows[0][0] == "00000–00002" and rows[-1][0] == "00015–00016"
