import logging

import pytest

from instaflow.couplings.prompts import load_prompts, prompt_of, prompts_hash, read_prompts, save_prompts
from instaflow.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"# one\n two  \n", ["# one", " two  "]),
        (b"one\n\n \t\r\n\ntwo\n", ["one", "two"]),
        ("a\u2028b\x0bc\n七\n".encode(), ["a\u2028b\x0bc", "七"]),  # no line ends to anybody but str.splitlines
    ],
)
def test_a_file_gives_a_prompt_a_line(tmp_path, data, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert read_prompts(path) == read_prompts(str(path)) == prompts


@pytest.mark.parametrize(("text", "blank"), [("a\n\n \nb\n", 2), ("a\n\n", 1), ("a\n ", 1), ("a\nb\n", 0), ("a", 0)])
def test_blank_lines_are_counted(tmp_path, caplog, text, blank):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        read_prompts(path)
    assert [record.getMessage() for record in caplog.records] == (
        [f'prompt file "{path}": {blank} blank lines skipped'] if blank else []
    )


def test_a_list_is_taken_as_it_is():
    prompts = ["", "a\nb", "a\nb", " "]
    assert read_prompts(prompts) == prompts


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\xc2\xa0\n", "holds no prompt"),
        (b"fine\nalso fine\ncaf\xe9\n", "not UTF-8: byte 18 (line 3) is 0xe9"),
        ("one\n".encode("utf-16"), "not UTF-8: byte 0 (line 1)"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, data, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert words in caught.value.message and str(path) in caught.value.message and caught.value.hint


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for source, words in (tmp_path / "nothing.txt", "does not exist"), (tmp_path, "is a folder"):
        with pytest.raises(ConfigError) as caught:
            read_prompts(source)
        assert words in caught.value.message and str(source) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "empty"), (["a", 7], "prompt 1"), (["a", None], "prompt 1"), (["\ud83d"], "prompt 0")]
)
def test_a_bad_list_is_refused(prompts, words):
    with pytest.raises(ConfigError) as caught:
        read_prompts(prompts)
    assert words in caught.value.message and caught.value.hint


def test_prompts_repeat_over_the_indices():
    assert [prompt_of(["a", "b", "c"], index) for index in (0, 2, 3, 3_000_001)] == ["a", "c", "a", "b"]


def test_the_hash_tells_order_and_borders():
    lists = [["a", "b"], ["b", "a"], ["a\nb"], ["a", "b", ""], ["ab"], ["a, b"], ['a", "b']]
    assert len({prompts_hash(prompts) for prompts in lists}) == len(lists)
    assert prompts_hash(["a", "b"]) == "3554d2b8a1e34099053865de8576d1460b807430ec8c6b85315c9607ba93d308"


def test_the_stage_keeps_its_prompts(tmp_path):
    prompts = ["", "a\nb", 'quo"te', "七", "a\u2028b"]
    (tmp_path / ".prompts.json.tmp-1").write_text("half a li")
    save_prompts(tmp_path, prompts)
    assert load_prompts(tmp_path) == prompts
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]


@pytest.mark.parametrize("data", [None, b"[", b"[]", b"{}", b'["a", 3]', b'["\xe9"]'])
def test_damaged_prompts_of_a_stage_are_refused(tmp_path, data):
    if data is not None:
        (tmp_path / "prompts.json").write_bytes(data)
    with pytest.raises(DataError, match=r"prompts\.json") as caught:
        load_prompts(tmp_path)
    assert f"delete {tmp_path} and run the stage's `instaflow couple` command again" in caught.value.hint
