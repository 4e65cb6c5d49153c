import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest

from instaflow.couplings import shards, verify_shard
from instaflow.couplings.loader import Couplings
from instaflow.couplings.manifest import read_manifest, write_manifest
from instaflow.couplings.moments import Moments
from instaflow.couplings.prompts import save_prompts
from instaflow.couplings.records import Kept, KeptImages, Shard, write_extra
from instaflow.couplings.shards import read_shard, read_sidecar, shards_fingerprint, sidecar_path, tar_path, write_shard
from instaflow.couplings.verify import bad_shards, verify
from instaflow.errors import DataError, Interrupted
from tests.couplings.made import PROMPTS, at_once, contents, make_couplings, make_shard, manifest_of, sample


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_couplings(tmp_path_factory.mktemp("sound") / "pairs", manifest_of())


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "pairs")


def cut_at_a_member(folder):
    with tarfile.open(tar_path(folder, 2)) as tar:
        boundary = tar.getmembers()[6].offset  # after two whole records
    data = tar_path(folder, 2).read_bytes()
    tar_path(folder, 2).write_bytes(data[:boundary])


def cut_at_a_member_and_closed(folder):
    """The cut tar with an end and padding of its own: a valid tar of the same size."""
    with tarfile.open(tar_path(folder, 2)) as tar:
        boundary = tar.getmembers()[6].offset
    data = tar_path(folder, 2).read_bytes()
    tar_path(folder, 2).write_bytes(data[:boundary] + bytes(len(data) - boundary))


def flip_a_byte(folder):
    with tarfile.open(tar_path(folder, 2)) as tar:
        member = tar.getmember("000000012.latent.npy")
    data = bytearray(tar_path(folder, 2).read_bytes())
    data[member.offset_data + member.size - 1] ^= 1  # in an array's last value: the tar still opens
    tar_path(folder, 2).write_bytes(data)


def empty(folder):
    tar_path(folder, 2).write_bytes(b"")


def delete_tar(folder):
    tar_path(folder, 2).unlink()


def delete_sidecar(folder):
    sidecar_path(folder, 2).unlink()


def delete_both(folder):
    delete_tar(folder)
    delete_sidecar(folder)


def another_shards_sidecar(folder):
    shutil.copy(sidecar_path(folder, 3), sidecar_path(folder, 2))


def another_shards_tar(folder):
    shutil.copy(tar_path(folder, 3), tar_path(folder, 2))


def another_shards_tar_and_sidecar(folder):
    another_shards_tar(folder)
    another_shards_sidecar(folder)


def edit_count(folder):
    sidecar = json.loads(sidecar_path(folder, 2).read_text())
    sidecar_path(folder, 2).write_text(json.dumps(sidecar | {"count": 4}))


def edit_hash(folder):
    sidecar = json.loads(sidecar_path(folder, 2).read_text())
    sidecar_path(folder, 2).write_text(json.dumps(sidecar | {"sha256": "0" * 64}))


def cut_sidecar(folder):
    path = sidecar_path(folder, 2)
    path.write_bytes(path.read_bytes()[:40])


CORRUPTIONS = {
    cut_at_a_member: "00002.tar",
    cut_at_a_member_and_closed: "00002.tar",
    flip_a_byte: "00002.tar",
    empty: "00002.tar",
    delete_tar: "00002.tar",
    delete_sidecar: "00002.json",
    delete_both: "00002.tar",
    another_shards_sidecar: "00002.json",
    another_shards_tar: "00002.tar",
    another_shards_tar_and_sidecar: "00002.json",
    edit_count: "00002.json",
    edit_hash: "00002.tar",
    cut_sidecar: "00002.json",
}


def test_sound_couplings_have_no_problem(folder):
    before = contents(folder)
    assert verify(folder) == []
    assert contents(folder) == before


@pytest.mark.parametrize(("corrupt", "name"), CORRUPTIONS.items())
def test_corruption_is_found_and_repaired(folder, corrupt, name):
    before = contents(folder)
    corrupt(folder)
    problems = verify(folder)
    assert [(problem.path, problem.shard, problem.stray) for problem in problems] == [
        (folder / "shards" / name, 2, False)
    ]
    assert bad_shards(problems) == [2]
    make_shard(folder, 2, manifest_of(), PROMPTS, at_once(sample))
    assert contents(folder) == before and verify(folder) == []


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corruption_is_refused_before_anything_is_decoded(folder, corrupt, monkeypatch):
    corrupt(folder)
    decode, decoded = shards.decode, []

    def watch(data, indices):
        decoded.append(indices[0] // 5)
        return decode(data, indices)

    monkeypatch.setattr(shards, "decode", watch)
    with pytest.raises(DataError) as caught:
        read_shard(folder, read_sidecar(folder, 2, manifest_of().plan))
    assert "00002." in caught.value.message and f"instaflow repair {folder}" in caught.value.hint
    with pytest.raises(DataError):
        Couplings(folder, seed=0).batch(0, 23)
    assert 2 not in decoded


def test_a_problem_is_a_sentence(folder):
    cut_at_a_member(folder)
    (problem,) = verify(folder)
    assert str(problem).startswith(f'"{tar_path(folder, 2)}" has ') and "bytes where its sidecar says" in str(problem)


def test_an_edited_left_out_is_refused_though_it_adds_up(folder):
    sidecar = json.loads(sidecar_path(folder, 2).read_text())
    sidecar_path(folder, 2).write_text(json.dumps(sidecar | {"count": 4, "left_out": [13]}))
    assert bad_shards(verify(folder)) == [2]
    with pytest.raises(DataError, match=r"it holds '000000013\.json', where '000000014\.json' is due"):
        Couplings(folder, seed=0).batch(0, 22)


def _rewrite(folder, **changes):
    """Shard 2 with other contents, and a sidecar that fits them."""
    records = read_shard(folder, read_sidecar(folder, 2, manifest_of().plan))
    parts = {"noise": records.noise, "latent": records.latent, "prompts": records.prompts, "indices": records.indices}
    write_shard(folder, 2, Shard(**(parts | changes)), left_out=[])


FLAT = np.concatenate([np.ones((1, 2, 4, 4)), sample(np.random.default_rng(0).standard_normal((4, 2, 4, 4)), [""] * 4)])
N01 = np.random.default_rng(1).standard_normal((5, 2, 4, 4))


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        (
            {"latent": np.full((5, 2, 4, 4), np.nan, np.float16)},
            ["record 10's latent, which is not finite (4 more are not sound)"],
        ),
        ({"latent": FLAT.astype(np.float16)}, ["holds record 10's latent, which is constant"]),
        ({"latent": (99 * FLAT[::-1]).astype(np.float16)}, ["record 10's latent, which has standard deviation"]),
        ({"latent": np.zeros((5, 2, 4, 4), np.float32)}, ["latent of float32[2, 4, 4] where the manifest says"]),
        ({"latent": np.zeros((5, 1, 4, 4), np.float16)}, ["latent of float16[1, 4, 4] where the manifest says"]),
        ({"noise": N01.astype(np.float16)}, ["noise that is not that of the manifest's seed"]),
        ({"noise": np.full((5, 2, 4, 4), np.inf, np.float16)}, ["noise that is not finite", "3 more such pairs"]),
        (
            {"noise": (3 * N01).astype(np.float16)},
            ["noise that is not that of the manifest's seed", "which is not N(0, 1) (z "],
        ),
        ({"prompts": ["a"] * 5}, ["prompts that are not the stage's"]),
        (
            {"extras": {"pooled.npy": {11: b""}}},
            ["holds pooled.npy of record 11, which the manifest does not announce"],
        ),
    ],
)
def test_wrong_contents_under_a_right_hash_are_found(folder, changes, faults):
    _rewrite(folder)
    assert verify(folder) == []
    _rewrite(folder, **changes)
    problems = verify(folder)
    assert len(problems) == len(faults)
    for problem, fault in zip(problems, faults, strict=True):
        assert fault in problem.fault and problem.path == tar_path(folder, 2) and problem.shard == 2


KEPT = Kept(pooled=(3,), images=KeptImages(every=2, format="png", size=(4, 4)))
POOLED = {index: write_extra("pooled.npy", np.full(3, index, np.float16)) for index in range(10, 15)}
IMAGES = {index: write_extra("image.png", np.full((4, 4, 3), index, np.uint8)) for index in (10, 12, 14)}


@pytest.mark.parametrize(
    ("extras", "fault"),
    [
        ({}, None),
        (
            {"pooled.npy": POOLED | {12: write_extra("pooled.npy", np.full(3, np.nan, np.float16))}},
            "12, which is not f",
        ),
        ({"pooled.npy": POOLED | {12: write_extra("pooled.npy", np.ones(3))}}, "12, which is float64[3] where the man"),
        ({"pooled.npy": {**POOLED, 12: b"no array"}}, "holds pooled.npy of record 12, which cannot be decoded: "),
        ({"pooled.npy": {10: POOLED[10]}}, "lacks pooled.npy of record 11, which the manifest announces"),
        ({"image.png": POOLED}, "holds image.png of record 10, which cannot be decoded"),
        (
            {"image.png": IMAGES | {13: IMAGES[12]}},
            "holds image.png of record 13, which the manifest does not announce",
        ),
        ({"image.png": {10: IMAGES[10], 12: IMAGES[12]}}, "lacks image.png of record 14"),
        ({"image.png": IMAGES | {14: write_extra("image.png", np.zeros((4, 4), np.uint8))}}, "is uint8[4, 4] where"),
    ],
)
def test_optional_fields_are_as_the_manifest_announces_them(folder, extras, fault):
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest_of(keep=KEPT))
    _rewrite(folder, extras={"pooled.npy": POOLED, "image.png": IMAGES} | extras)
    problems = [problem for problem in verify(folder) if problem.shard == 2]
    assert all(problem.path == tar_path(folder, 2) for problem in problems)
    if fault is None:
        assert problems == []
    else:
        assert fault in problems[0].fault


def test_noise_that_stands_twice_is_told_with_both_records(folder):
    first = read_shard(folder, read_sidecar(folder, 1, manifest_of().plan))
    second = read_shard(folder, read_sidecar(folder, 2, manifest_of().plan))
    _rewrite(folder, noise=np.concatenate([second.noise[:3], first.noise[1:2], second.noise[3:4]]))
    problems = verify(folder)
    assert bad_shards(problems) == [2]  # shard 1 holds what it should
    assert problems[1].path == tar_path(folder, 2)
    assert problems[1].fault == f'holds in record 13 the noise of record 6 of "{tar_path(folder, 1)}"'
    _rewrite(folder, noise=first.noise)
    assert f'holds in record 10 the noise of record 5 of "{tar_path(folder, 1)}" (4 more such pairs)' in str(
        verify(folder)[1]
    )


def test_the_shard_to_make_again_is_the_one_that_copied_though_it_comes_first(folder):
    first = read_shard(folder, read_sidecar(folder, 1, manifest_of().plan))
    records = read_shard(folder, read_sidecar(folder, 2, manifest_of().plan))
    write_shard(folder, 1, Shard(records.noise, first.latent, first.prompts, first.indices), left_out=[])
    problems = verify(folder)
    assert bad_shards(problems) == [1]
    assert f'record 5 the noise of record 10 of "{tar_path(folder, 2)}"' in str(problems[1])


def test_the_moments_of_the_whole_set_find_what_no_shard_shows(folder, monkeypatch):
    monkeypatch.setattr(
        verify_shard, "moments_of", lambda noise: Moments(noise.size, 8.0 * noise.size**0.5, 1.0 * noise.size)
    )
    problems = verify(folder)
    assert [problem.path for problem in problems] == [folder] and problems[0].shard is None
    assert "over all its shards, noise of mean" in problems[0].fault


def test_what_is_found_does_not_depend_on_the_workers(folder):
    edit_hash(folder)
    tar_path(folder, 4).unlink()
    first = read_shard(folder, read_sidecar(folder, 0, manifest_of().plan))
    third = read_shard(folder, read_sidecar(folder, 3, manifest_of().plan))
    write_shard(folder, 3, Shard(first.noise, third.latent, third.prompts, third.indices), left_out=[])
    alone = verify(folder)
    assert bad_shards(alone) == [2, 3, 4]
    for workers in (2, 5, 8):
        assert verify(folder, workers=workers) == alone


def test_progress_counts_couplings_and_a_stop_ends_it(folder):
    told = []
    assert verify(folder, progress=told.append) == [] and told == [5, 10, 15, 20, 23]
    for workers in (1, 2):
        with pytest.raises(Interrupted, match=r"of 5 shards of .* were read"):
            verify(folder, workers=workers, stop=lambda: True)


def test_shards_that_are_still_to_be_made_are_no_damage(folder):
    (folder / "state.json").write_text('{"state": "running"}')
    delete_both(folder)
    sidecar_path(folder, 3).unlink()  # killed between tar and sidecar
    assert verify(folder) == []
    flip_sidecar = json.loads(sidecar_path(folder, 4).read_text())
    sidecar_path(folder, 4).write_text(json.dumps(flip_sidecar | {"sha256": "0" * 64}))
    assert bad_shards(verify(folder)) == [4]
    (folder / "done.json").write_text("{}")
    assert bad_shards(verify(folder)) == [2, 3, 4]


def test_shards_of_another_run_are_found(folder, tmp_path):
    other = make_couplings(tmp_path / "other", manifest_of(seed=1))
    for path in tar_path, sidecar_path:
        shutil.copy(path(other, 2), path(folder, 2))
    assert bad_shards(verify(folder)) == [2]


def test_each_bad_shard_is_named(folder):
    tar_path(folder, 0).unlink()
    edit_count(folder)
    sidecar_path(folder, 4).unlink()
    assert bad_shards(verify(folder)) == [0, 2, 4]


def test_strays_are_named_and_harm_nothing(folder):
    strays = ["shards/.00001.tar.tmp-7", "shards/00005.json", "shards/notes.txt", ".manifest.json.tmp-7"]
    for name in strays:
        (folder / name).write_text("")
    problems = verify(folder)
    assert sorted(str(problem.path.relative_to(folder)) for problem in problems) == sorted(strays)
    assert all(problem.stray for problem in problems) and bad_shards(problems) == []
    assert len(Couplings(folder, seed=0)) == 23


def test_lost_or_changed_prompts_are_a_problem_that_no_shard_can_mend(folder):
    (folder / "prompts.json").unlink()
    save_prompts(folder, [*PROMPTS[:-1], "another"])
    (changed,) = verify(folder)
    (folder / "prompts.json").unlink()
    (lost,) = verify(folder)
    assert changed.path == lost.path == folder / "prompts.json" and "hash" in changed.fault
    assert not changed.stray and bad_shards([changed, lost]) == []


BEGUN = {
    "format": 1,
    "name": "pairs",
    "seed": 0,
    "count": 23,
    "records_per_shard": 5,
    "batch_size": 2,
    "num_steps": 25,
    "guidance_scale": 3.0,
    "timestep_spacing": None,
    "dtype": "float32",
    "keep": None,
    "prompts": "1" * 64,
    "model (content)": "0" * 64,
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"num_steps": 50}, "'num_steps' is 50 here, 25 in stage.json"),
        ({"guidance_scale": 7.5}, "'guidance_scale' is 7.5 here, 3.0 in stage.json"),
        ({"seed": 1, "count": 9}, "'seed' is 1 here, 0 in stage.json; 'count' is 9 here, 23 in stage.json"),
        ({"stage": "other"}, "'stage' is 'other' here, 'pairs' in stage.json"),
        ({"model_fingerprint": "2"}, f"'model_fingerprint' is '2' here, '{'0' * 64}' in stage.json"),
        ({"keep": {"pooled": [3], "embedding": [2, 3]}}, "'keep.embeddings' is True here, False in stage.json"),
    ],
)
def test_a_manifest_that_is_not_what_the_stage_was_begun_with_is_all_that_is_told(folder, changes, fault):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "stage.json").write_text(json.dumps({"identity": BEGUN, "settings": {"kind": "couple"}}))
    problems = verify(folder)
    if fault is None:
        assert problems == []
    else:
        ((path, said, shard, stray),) = [(one.path, one.fault, one.shard, one.stray) for one in problems]
        assert said == f"is not what the stage was begun with: {fault}"
        assert (path, shard, stray) == (folder / "manifest.json", None, False)


def test_the_optional_fields_of_a_stage_are_those_that_it_was_begun_with(folder):
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest_of(keep=KEPT))
    keep = {"images": {"every": 2, "format": "png"}, "embeddings": False, "trajectory": None}
    (folder / "stage.json").write_text(json.dumps({"identity": BEGUN | {"keep": keep}}))
    assert bad_shards(verify(folder)) == [0, 1, 2, 3, 4]  # that is believed
    keep["images"]["every"] = 3
    (folder / "stage.json").write_text(json.dumps({"identity": BEGUN | {"keep": keep}}))
    (problem,) = verify(folder)
    assert "'keep.images' is {'every': 2, 'format': 'png'} here, {'every': 3" in problem.fault


def test_sound_shards_that_are_not_those_that_the_stage_was_done_with_are_told(folder):
    mark = folder / "done.json"
    mark.write_text(json.dumps({"fingerprint": shards_fingerprint(folder, manifest_of().plan)}))
    assert verify(folder) == []
    shifted = at_once(lambda noise, prompts: sample(noise, prompts) + 1)
    make_shard(folder, 2, manifest_of(), PROMPTS, shifted)
    (problem,) = verify(folder)
    assert problem.path == mark and "another fingerprint" in problem.fault and problem.shard is None
    tar_path(folder, 4).unlink()
    assert [problem.shard for problem in verify(folder)] == [4]  # first of all, that can be mended
    make_shard(folder, 4, manifest_of(), PROMPTS, at_once(sample))
    mark.write_text("{")
    (problem,) = verify(folder)
    assert problem.path == mark and problem.fault.startswith("is damaged")


def test_the_embeddings_of_no_prompt_are_as_the_manifest_announces_them(folder):
    embedding, pooled, path = np.ones((2, 3), np.float16), np.ones(3, np.float16), folder / "no-prompt.npz"
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest_of(keep=Kept(embedding=(2, 3), pooled=(3,))))
    extras = {"embedding.npy": embedding, "pooled.npy": pooled}
    for shard in range(5):
        records = read_shard(folder, read_sidecar(folder, shard, read_manifest(folder).plan))
        kept = {name: dict.fromkeys(records.indices, write_extra(name, value)) for name, value in extras.items()}
        write_shard(folder, shard, dataclasses.replace(records, extras=kept), left_out=[])

    def told() -> list[str]:
        problems = verify(folder)
        assert all(problem.path == path and problem.shard is None for problem in problems)
        return [problem.fault for problem in problems]

    assert told() == ["cannot be read: No such file or directory"]
    np.savez(path, embedding=embedding, pooled=pooled)
    assert told() == []
    whole = path.read_bytes()
    for damaged in b"", whole[:-40], whole.replace(embedding.tobytes(), b"x" * embedding.nbytes):
        path.write_bytes(damaged)
        assert told()[0].startswith("is damaged: ")
    np.savez(path, embedding=embedding)
    assert told() == ["lacks pooled, which the manifest announces"]
    np.savez(path, embedding=embedding * np.float16("nan"), pooled=pooled)
    assert told() == ["holds embedding, which is not finite"]
    np.savez(path, embedding=embedding[:1], pooled=pooled)
    assert told() == ["holds embedding, which is float16[1, 3] where the manifest says float16[2, 3]"]
    (folder / "state.json").write_text('{"state": "interrupted"}')
    for shard in range(5):
        sidecar_path(folder, shard).unlink()
    path.unlink()
    assert verify(folder) == []  # the stage's command will put it there


def test_a_folder_without_couplings_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        verify(tmp_path)
    write_manifest(tmp_path, manifest_of())
    assert bad_shards(verify(tmp_path)) == [0, 1, 2, 3, 4]
