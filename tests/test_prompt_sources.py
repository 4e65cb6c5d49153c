import io
import json
import sys
import tarfile
import uuid

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from instaflow import prompt_sources
from instaflow.errors import ConfigError
from instaflow.files import sha256_of
from instaflow.prompt_sources import Prompts, content_of, exists, prompts_hash
from instaflow.sections import PromptSource

CAPTIONS = ["a red bus", "two dogs, running", 'a "big" 七', "# a road", " a spaced one "]
ROWS = [{"url": f"u{row}", "caption": caption, "score": row} for row, caption in enumerate(CAPTIONS)]


def refusal(source) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        list(Prompts(source))
    assert caught.value.message
    return caught.value


# --- files of each form -----------------------------------------------------------------------------------------------


def csv_bytes(delimiter: str) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, ["url", "caption", "score"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def jsonl_bytes(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(columns: dict) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


def coco_bytes(annotations) -> bytes:
    images = [{"id": 7, "file_name": "000000000007.jpg"}]
    return json.dumps({"info": {}, "images": images, "annotations": annotations}).encode()


def tar_bytes(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def shard_bytes(rows=ROWS, first: int = 0) -> bytes:
    """As img2dataset writes it."""
    members: dict[str, bytes | str] = {}
    for key, row in enumerate(rows, first):
        meta = {**row, "key": f"{key:09d}", "status": "success"}
        members |= {f"{key:09d}.{ending}": content for ending, content in (
            ("jpg", b"\xff\xd8" * 700), ("json", json.dumps(meta)), ("txt", row["caption"]))}  # fmt: skip
    return tar_bytes(members)


FORMS = {
    "p.txt": ("\n".join(CAPTIONS).encode(), None),
    "p.csv": (csv_bytes(","), "caption"),
    "p.tsv": (csv_bytes("\t"), "caption"),
    "p.jsonl": (jsonl_bytes(), "caption"),
    "p.parquet": (parquet_bytes({key: [row[key] for row in ROWS] for key in ROWS[0]}), "caption"),
    "p.json": (coco_bytes([{"image_id": 7, "id": i, "caption": text} for i, text in enumerate(CAPTIONS)]), None),
    "p.tar": (shard_bytes(), None),
    "P.TAR": (shard_bytes(), "caption"),
}


@pytest.fixture
def memory():
    """A folder in fsspec's memory, as a URL."""
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    fsspec.filesystem("memory").rm(folder, recursive=True)


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return url


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_prompts_from_a_file_and_a_url(tmp_path, memory, name):
    data, column = FORMS[name]
    for url in str(tmp_path / name), f"{memory}/{name}":
        prompts = Prompts(PromptSource(path=put(url, data), column=column))
        assert list(prompts) == list(prompts) == CAPTIONS
        assert prompts.total == len(CAPTIONS) and not prompts.dropped


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.parquet", "p.tar"])
def test_a_score_column_leaves_out_the_low_ones(tmp_path, name):
    path = put(str(tmp_path / name), FORMS[name][0])
    prompts = Prompts(PromptSource(path=path, column="caption", score_column="score", min_score=3))
    assert list(prompts) == CAPTIONS[3:]
    assert dict(prompts.dropped) == {"with score below 3.0": 3}


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
def test_a_text_file_gives_a_prompt_a_line(tmp_path, monkeypatch, data, prompts):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    for size in (1 << 20, 2):  # of what is read at a time
        monkeypatch.setattr("instaflow.prompt_files.CHUNK", size)
        assert list(Prompts(path)) == list(Prompts(str(path))) == prompts


@pytest.mark.parametrize(("text", "blank"), [("a\n\n \nb\n", 2), ("a\n\n", 1), ("a\n ", 1), ("a\nb\n", 0), ("a", 0)])
def test_blank_lines_are_counted(tmp_path, text, blank):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    prompts = Prompts(path)
    list(prompts)
    assert prompts.dropped["blank"] == blank


def test_a_list_is_taken_as_it_is():
    prompts = ["", "a\nb", "a\nb", " "]
    assert list(Prompts(prompts)) == prompts


def test_a_field_in_quotes_may_hold_lines(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfcaption,n\r\n"one\r\ntwo, ""three""",1\r\n\r\nfour,2\r\n')
    prompts = Prompts(PromptSource(path=str(path), column="caption"))
    assert list(prompts) == ['one\r\ntwo, "three"', "four"]
    assert dict(prompts.dropped) == {"blank": 1}


def test_a_shard_without_txt_gives_the_captions_of_its_json(tmp_path):
    members = {"00/1.json": '{"caption": "one"}', "00/1.cls": "3", "00/2.x.jpg": "", "00/2.txt": "two", "README": "no"}
    path = put(str(tmp_path / "p.tar"), tar_bytes(members))
    assert list(Prompts(path)) == ["one", "two"]


# --- many files -------------------------------------------------------------------------------------------------------


def test_patterns_globs_and_folders_are_read_in_order(tmp_path, memory):
    for folder in str(tmp_path / "laion"), f"{memory}/laion":
        if "://" not in folder:
            (tmp_path / "laion").mkdir()
        for shard in 2, 0, 10, 1:
            put(f"{folder}/{shard:05d}.tar", shard_bytes([{"caption": f"of {shard}"}]))
        put(f"{folder}/00000.parquet", b"img2dataset puts its metadata beside")
        assert list(Prompts(folder)) == list(Prompts(f"{folder}/*.tar")) == ["of 0", "of 1", "of 2", "of 10"]
        assert list(Prompts(f"{folder}/{{00000..00002}}.tar")) == ["of 0", "of 1", "of 2"]
        assert list(Prompts(f"{folder}/{{00002,00000}}.tar")) == ["of 2", "of 0"]
        assert "00003.tar' does not exist" in refusal(f"{folder}/{{00002..00003}}.tar").message


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    path = put(str(tmp_path / "{a,b}[1]*.txt"), b"one")
    assert list(Prompts(path)) == ["one"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.txt", "gone.txt' does not exist"),
        ("empty", "is a folder without .tar files"),
        ("*.tar", "matches no file"),
        ("{0..2.tar", "does not close"),
        ("nosuch://x/y.txt", "cannot be reached: Protocol not known"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    source = path if "://" in path else str(tmp_path / path)
    error = refusal(source)
    assert words in error.message and path in error.message and error.hint
    assert not exists(source)


# --- bad rows ---------------------------------------------------------------------------------------------------------

HALF = b'{"caption": "\\ud83d"}\n'
TAR = shard_bytes()


@pytest.mark.parametrize(
    ("name", "data", "column", "words"),
    [
        ("p.txt", b"", None, "holds no prompt"),
        ("p.txt", b"\n  \n\xc2\xa0\n", None, "holds no prompt that is taken: 0 of 3 prompts taken; left out: 3 blank"),
        ("p.txt", b"fine\nalso fine\ncaf\xe9\n", None, "p.txt' line 3 is not UTF-8: its byte 4 is 0xe9"),
        ("p.txt", "one\n".encode("utf-16"), None, "line 1 is not UTF-8"),
        ("p.txt", b"one", "caption", "has no columns"),
        ("p.csv", b"", "caption", "no column 'caption'"),
        ("p.csv", b"a,b\n1,2\n", None, "'column' does not say which"),
        ("p.csv", b"a,b\n1,2\n", "caption", "no column 'caption'"),
        ("p.csv", b"a,a\n1,2\n", "a", "more than one column 'a'"),
        ("p.csv", b"a,b\n1,2\n3\n", "a", "line 3 has 1 fields where the header has 2"),
        ("p.csv", b'a,b\n1,2\n"3"4,5\n', "a", "line 3 cannot be read"),
        ("p.csv", b'a,b\n1,2\n"3,5\n', "a", "line 3 cannot be read: unexpected end of data"),
        ("p.csv", b"a,b\n1,2\n\xe9,5\n", "a", "line 3 is not UTF-8"),
        ("p.jsonl", b'{"caption": "a"}\n{"caption": "b"\n', "caption", "line 2 is not JSON"),
        ("p.jsonl", b'{"caption": "a"}\n["b"]\n', "caption", "line 2 is not a JSON object"),
        ("p.jsonl", b'{"caption": "a"}\n{"text": "b"}\n', "caption", "line 2 has no 'caption'"),
        ("p.jsonl", b'{"caption": "a"}\n', None, "'column' does not say which"),
        ("p.jsonl", b'\n{"caption": null}\n', "caption", "left out: 1 blank, 1 null"),
        ("p.jsonl", b'{"caption": 7}\n', "caption", "line 1 must be a text, not 7"),
        ("p.jsonl", b'{"caption": "a"}\n' + HALF, "caption", "line 2 has half a character"),
        ("p.jsonl", b'{"caption": "\xe9"}\n', "caption", "line 1 is not UTF-8"),
        ("p.parquet", parquet_bytes({"a": ["x"]}), "caption", "no column 'caption'"),
        ("p.parquet", parquet_bytes({"a": [1, 2]}), "a", "row 1 must be a text, not 1"),
        ("p.parquet", parquet_bytes({"a": ["x"]})[:-9], "a", "cannot be read"),
        ("p.parquet", b"", "a", "cannot be read"),
        ("p.json", b"{", None, "is not JSON"),
        ("p.json", b'["a"]', None, "no list 'annotations'"),
        ("p.json", coco_bytes([{"caption": "a"}, {"bbox": [1]}]), None, "annotation 2 has no 'caption'"),
        ("p.json", coco_bytes(["a"]), None, "annotation 1 is not a JSON object"),
        ("p.json", coco_bytes([]), None, "holds no prompt"),
        ("p.json", coco_bytes([]), "caption", "has no columns"),
        ("p.tar", b"", None, "is not a whole tar"),
        ("p.tar", TAR[: len(TAR) // 2 // 512 * 512], None, "is not a whole tar"),
        ("p.tar", TAR[: TAR.index(b"000000001.jpg")], None, "is not a whole tar"),  # between two members
        ("p.tar", TAR[: TAR.index(b"000000001.json") + 300], None, "is not a whole tar"),  # in a header
        ("p.tar", tar_bytes({"1.jpg": "x"}), None, "sample 1 has no '1.txt' and no '1.json'"),
        ("p.tar", tar_bytes({"1.txt": "x"}), "caption", "sample 1 has no '1.json'"),
        ("p.tar", tar_bytes({"1.txt": "x", "2.txt": b"\xe9"}), None, "sample 2, .txt is not UTF-8"),
        ("p.tar", tar_bytes({"1.txt": "x", "2.json": "{"}), None, "sample 2, .json is not JSON"),
        ("p.txt.gz", b"", None, "is compressed"),
        ("p.jsonl.zst", b"", "a", "is compressed"),
        ("p.tar", tar_bytes({"1.txt": "x", "1.TXT": "y"}), None, "sample 1 has its .txt twice"),
    ],
)
def test_a_bad_file_is_refused_by_its_place(tmp_path, name, data, column, words):
    path = put(str(tmp_path / name), data)
    error = refusal(PromptSource(path=path, column=column))
    assert words in error.message and path in error.message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.jsonl", jsonl_bytes([{"a": None, "s": 1}, {"a": "x", "s": 1}, {"a": "y", "s": None}])),
        ("p.jsonl", jsonl_bytes([{"a": None, "s": None}, {"a": "x", "s": 1}, {"a": "y", "s": float("nan")}])),
        ("p.parquet", parquet_bytes({"a": [None, "x", "y"], "s": [1.0, 1.0, None]})),
        ("p.parquet", parquet_bytes({"a": [None, "x", "y"], "s": [1.0, 1.0, float("nan")]})),
    ],
)
def test_rows_without_a_prompt_or_a_score_are_left_out_and_counted(tmp_path, name, data):
    prompts = Prompts(PromptSource(path=put(str(tmp_path / name), data), column="a", score_column="s", min_score=0))
    assert list(prompts) == ["x"]
    assert dict(prompts.dropped) == {"null": 1, "without s": 1}


def test_a_csv_s_empty_score_is_none(tmp_path):
    path = put(str(tmp_path / "p.csv"), b"a,s\nx,1\ny,\n")
    prompts = Prompts(PromptSource(path=path, column="a", score_column="s", min_score=0))
    assert list(prompts) == ["x"] and dict(prompts.dropped) == {"without s": 1}


@pytest.mark.parametrize("score", ["high", True, "nan", [1]])
def test_a_score_that_is_no_number_is_refused(tmp_path, score):
    path = put(str(tmp_path / "p.jsonl"), jsonl_bytes([{"caption": "a", "s": 3}, {"caption": "b", "s": score}]))
    source = PromptSource(path=path, column="caption", score_column="s", min_score=0)
    assert "p.jsonl' line 2: 's' must be a number, not " in refusal(source).message


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    path = put(str(tmp_path / "p.parquet"), FORMS["p.parquet"][0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(PromptSource(path=path, column="caption")).hint == "Run: pip install pyarrow"


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "empty"), (["a", 7], "prompt 1"), (["a", None], "prompt 1"), (["\ud83d"], "prompt 0")]
)
def test_a_bad_list_is_refused(prompts, words):
    error = refusal(prompts)
    assert words in error.message and error.hint


def test_what_the_system_says_of_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("a")
    error = refusal(tmp_path / "file" / "p.txt")
    assert error.message == f"'{tmp_path}/file/p.txt' cannot be read: Not a directory"


# --- filters ----------------------------------------------------------------------------------------------------------


def test_what_filters_leave_out_is_counted_and_said(tmp_path):
    lines = ["", "a", "bb", "bb", "ccc", "dddd", "七七", "bb", "  "]
    path = put(str(tmp_path / "p.txt"), "\n".join(lines).encode())
    prompts = Prompts(PromptSource(path=path, min_length=2, max_length=3, deduplicate=True))
    assert list(prompts) == ["bb", "ccc", "七七"]
    assert str(prompts) == (
        "3 of 9 prompts taken; left out: 2 blank, 1 shorter than 2 characters, 1 longer than 3 characters, 2 repeated"
    )


def test_repeated_prompts_are_found_however_far_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "REPEATS", 7)
    lines = [f"{(index * index) % 101}" for index in range(1000)]
    path = put(str(tmp_path / "p.txt"), "\n".join(lines).encode())
    prompts = Prompts(PromptSource(path=path, deduplicate=True))
    assert list(prompts) == list(dict.fromkeys(lines))
    assert prompts.dropped == {"repeated": 1000 - 51}


def test_filters_that_leave_nothing_are_refused(tmp_path):
    path = put(str(tmp_path / "p.txt"), b"one\ntwo")
    error = refusal(PromptSource(path=path, min_length=4))
    assert error.message.endswith("taken: 0 of 2 prompts taken; left out: 2 shorter than 4 characters")
    assert error.hint


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_hash_tells_order_and_borders():
    lists = [["a", "b"], ["b", "a"], ["a\nb"], ["a", "b", ""], ["ab"], ["a, b"], ['a", "b']]
    assert len({prompts_hash(prompts) for prompts in lists}) == len(lists)
    assert prompts_hash(["a", "b"]) == "3554d2b8a1e34099053865de8576d1460b807430ec8c6b85315c9607ba93d308"


def test_the_hash_does_not_tell_how_prompts_are_handed_in(monkeypatch):
    whole = prompts_hash(CAPTIONS)
    monkeypatch.setattr(prompt_sources, "BLOCK", 2)
    assert prompts_hash(iter(CAPTIONS)) == prompts_hash(CAPTIONS) == whole


def test_a_text_file_counts_by_its_bytes_and_all_else_by_its_prompts(tmp_path, memory):
    data, by_prompts = FORMS["p.txt"][0], prompts_hash(CAPTIONS)
    path = put(str(tmp_path / "p.txt"), data)
    by_bytes = sha256_of(tmp_path / "p.txt")
    assert content_of(path) == content_of(PromptSource(path=path)) == by_bytes
    assert content_of(put(f"{memory}/other.txt", data)) == by_bytes
    assert content_of(PromptSource(path=path, deduplicate=True)) == content_of(CAPTIONS) == by_prompts
    for name in ("p.csv", "p.parquet", "p.tar"):
        source = PromptSource(path=put(str(tmp_path / name), FORMS[name][0]), column="caption")
        assert content_of(source) == by_prompts


def test_whether_a_source_is_there(tmp_path, memory):
    for folder in str(tmp_path), memory:
        assert exists(put(f"{folder}/p.txt", b"a"))
        assert exists(f"{folder}/*.txt") and not exists(f"{folder}/*.csv") and not exists(f"{folder}/q.txt")
    assert exists(["a"])
