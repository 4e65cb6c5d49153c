import json

import pytest

from instaflow.couplings.manifest import read_manifest, write_manifest
from instaflow.errors import DataError
from tests.couplings.made import manifest_of


def test_a_manifest_comes_back(tmp_path):
    manifest = manifest_of(hardware={"device": "NVIDIA H200", "count": 2}, guidance_scale=7.5)
    (tmp_path / ".manifest.json.tmp-1").write_text("{")
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (manifest.plan.count, manifest.plan.records_per_shard) == (23, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "count"),
        ({"count": "23"}, "count"),
        ({"latent_shape": [4, 8]}, "latent_shape"),
        ({"stored_dtype": "bfloat16"}, "stored_dtype"),
        ({"sampler": "ddim"}, "sampler"),
        ({"counts": 3}, "counts"),
        ({"format_version": 2}, "format version 2"),
    ],
)
def test_another_manifest_is_refused(tmp_path, change, words):
    write_manifest(tmp_path, manifest_of())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert words in caught.value.message and str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("text", [None, "", "{}", '{"count": 23'])
def test_a_missing_or_cut_manifest_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_stage_without_its_manifest_is_to_be_deleted(tmp_path, text):
    folder = tmp_path / "my run" / "pairs"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text("{}")
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_manifest(folder)
    assert f"delete '{folder}' and run the stage's `instaflow couple` command again" in caught.value.hint


@pytest.mark.parametrize("text", [None, '{"name": "an app"}'])
def test_a_folder_that_is_no_stage_is_not_to_be_deleted(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert "Name the folder of a couple stage" in caught.value.hint
    assert "delete" not in caught.value.hint


def test_a_stage_of_another_kind_is_not_to_be_deleted(tmp_path):
    (tmp_path / "stage.json").write_text('{"settings": {"kind": "teacher"}}')
    with pytest.raises(DataError, match="is a stage of kind teacher") as caught:
        read_manifest(tmp_path)
    assert "delete" not in caught.value.hint
