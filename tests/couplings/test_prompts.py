import json

import pytest

from instaflow.couplings.prompts import KeptPrompts, prompt_of, save_prompts
from instaflow.errors import DataError
from instaflow.prompt_sources import prompts_hash

ODD = ["", "a\nb", 'quo"te', "七", "a\u2028b", "],\n[", "\\", " ", "\x00"]


def test_prompts_repeat_over_the_indices():
    assert [prompt_of(["a", "b", "c"], index) for index in (0, 2, 3, 3_000_001)] == ["a", "c", "a", "b"]


def test_the_stage_keeps_its_prompts(tmp_path):
    (tmp_path / ".prompts.json.tmp-1").write_text("half a li")
    save_prompts(tmp_path, iter(ODD))
    kept = KeptPrompts(tmp_path)
    assert list(kept) == ODD and len(kept) == len(ODD) and kept.hash == prompts_hash(ODD)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]


def test_what_is_kept_stays_for_who_has_it_open(tmp_path):
    save_prompts(tmp_path, ["a", "b"])
    before = (tmp_path / "prompts.json").stat().st_ino
    save_prompts(tmp_path, ["a", "b"])
    assert (tmp_path / "prompts.json").stat().st_ino == before


def test_they_are_kept_as_json_with_one_a_line(tmp_path):
    """The form that earlier versions wrote, so that their stages stay valid."""
    for prompts in (ODD, ["a"], ["a"] * 5000):  # 5000: more than are written at a time
        (tmp_path / "prompts.json").unlink(missing_ok=True)
        save_prompts(tmp_path, prompts)
        assert (tmp_path / "prompts.json").read_text("utf-8") == json.dumps(
            prompts, indent=0, ensure_ascii=False
        ) + "\n"


def test_any_of_many_is_found(tmp_path):
    prompts = [f"{index} {'七' * (index % 50)}" for index in range(30_000)]  # more than are read at a time
    save_prompts(tmp_path, prompts)
    kept = KeptPrompts(tmp_path)
    assert kept.hash == prompts_hash(prompts)
    assert [kept[index] for index in (29_999, 0, 12_345, -1, -30_000)] == [
        prompts[index] for index in (29_999, 0, 12_345, -1, -30_000)
    ]
    assert kept[20_000:20_003] == prompts[20_000:20_003]
    with pytest.raises(IndexError):
        kept[30_000]


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"[",
        b"[]",
        b"[\n]\n",
        b"{}",
        b'["a", 3]',
        b'["\xe9"]',
        b'[\n"a",\n3\n]\n',
        b'[\n"a",\n"\xe9"\n]\n',
        b'[\n"a",\n"b"\n',
        b'[\n"a",\n"b", "c"\n]\n',
        b'[\n"a",\n\n"b"\n]\n',
    ],
)
def test_damaged_prompts_of_a_stage_are_refused(tmp_path, data):
    if data is not None:
        (tmp_path / "prompts.json").write_bytes(data)
    with pytest.raises(DataError, match=r"prompts\.json") as caught:
        KeptPrompts(tmp_path)
    assert f"delete {tmp_path} and run the stage's `instaflow couple` command again" in caught.value.hint
