"""The rows of a prompt file in each form that people keep prompts in: read one by one, a bad one named by its place."""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from instaflow.errors import ConfigError

Row = tuple[int | str, Any, Any]
"""Where it stands in its file, its prompt, and its score (None without a score column); neither is checked yet."""

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
CHUNK = 1 << 20  # bytes
ROWS = 8192  # of parquet, at a time
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLE = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
"""A webdataset member: its sample's key, and what follows the first dot of its name."""


def is_coco(path: str) -> bool:
    """Whether a file of captions is in COCO's own form, by its name; else it is any file of prompts."""
    return PurePosixPath(path).suffix.lower() == ".json"


def rows_of(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    """The rows of the file, whose form its `name` tells by its ending. Raises ConfigError, which names the place."""
    form = READERS.get(suffix_of(name))
    if suffix_of(name) in PACKED:
        raise ConfigError(f"'{name}' is compressed", "Unpack it: a parquet file is compressed in itself")
    if form is None and (column or score_column):
        kinds = ", ".join(READERS)
        raise ConfigError(f"'{name}' is a text file with a prompt a line: it has no columns", f"With columns: {kinds}")
    return form(file, name, column, score_column) if form else text_rows(file, name)


def place_in(name: str, place: int | str) -> str:
    """A row's place in words, for a message."""
    return f"'{name}' {PLACES.get(suffix_of(name), 'line')} {place}"


def is_text(name: str) -> bool:
    """Whether the file is one of text, a prompt a line: any without the ending of another form."""
    return suffix_of(name) not in READERS


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


# --- text -------------------------------------------------------------------------------------------------------------


def lines_of(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1; only LF ends one, and a byte order mark is dropped. Raises ConfigError."""
    for number, line in enumerate(byte_lines_of(file), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            message = f"'{name}' line {number} is not UTF-8: its byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise ConfigError(message, "Save it as UTF-8, or convert it: iconv -f LATIN1 -t UTF-8") from error
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def byte_lines_of(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(CHUNK):  # a remote file's own readline is slow
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def text_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in lines_of(file, name):
        yield number, line.removesuffix("\r"), None


# --- tables -----------------------------------------------------------------------------------------------------------


def csv_rows(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    """Rows after a header; a field in double quotes may hold the delimiter, line ends and doubled quotes."""
    delimiter = "\t" if suffix_of(name) == ".tsv" else ","
    reader = csv.reader((f"{line}\n" for _, line in lines_of(file, name)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        places = [header.index(wanted) for wanted in chosen(header, name, column, score_column)]
        for row in reader:
            if row and len(row) != len(header):
                fault = f"has {len(row)} fields where the header has {len(header)}"
                raise ConfigError(f"{place_in(name, reader.line_num)} {fault}", "Put a text with delimiters in quotes")
            yield reader.line_num, *(picked([row[place] for place in places]) if row else ("", None))
    except csv.Error as error:
        message = f"{place_in(name, reader.line_num)} cannot be read: {error}"
        raise ConfigError(
            message, 'Put a text with quotes in quotes, and double those inside: "a ""big"" dog"'
        ) from error


def jsonl_rows(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    for number, line in lines_of(file, name):
        if not line.strip():
            yield number, "", None
            continue
        row = json_object(line, name, number)
        if column is None:
            chosen(list(row), name, column, score_column)
        yield number, *picked([value_of(row, key, name, number) for key in (column, score_column) if key])


def parquet_rows(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"'{name}' is a parquet file, which pyarrow reads", "Run: pip install pyarrow") from error
    number = 1
    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = chosen(table.schema_arrow.names, name, column, score_column)
        for batch in table.iter_batches(ROWS, columns=list(dict.fromkeys(wanted))):
            for row in zip(*(batch.column(key).to_pylist() for key in wanted), strict=True):
                yield number, *picked(row)
                number += 1
    except (pyarrow.ArrowException, ValueError) as error:
        message = f"{place_in(name, number)} or after it cannot be read: {first_line(error)}"
        raise ConfigError(message, "Check that it is a whole parquet file, its texts in UTF-8") from error


def chosen(columns: Sequence[str], name: str, column: str | None, score_column: str | None) -> list[str]:
    """The columns to read. Raises ConfigError where there is no such column, or none was chosen."""
    has = f"Its columns: {', '.join(map(str, columns))}" if columns else "It is empty"
    if column is None:
        raise ConfigError(f"'{name}' has columns, and 'column' does not say which one holds the prompts", has)
    wanted = [key for key in (column, score_column) if key is not None]
    for key in wanted:
        if list(columns).count(key) != 1:
            raise ConfigError(f"'{name}' has {'no' if key not in columns else 'more than one'} column '{key}'", has)
    return wanted


def picked(values: Sequence[Any]) -> tuple[Any, Any]:
    """Prompt and score of a row's chosen values."""
    return values[0], values[1] if len(values) > 1 else None


# --- COCO and webdataset ----------------------------------------------------------------------------------------------


def coco_rows(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    """COCO's captions in the order of the file's annotations. It is one JSON document, and is parsed as a whole."""
    if column or score_column:
        raise ConfigError(f"'{name}' is a file of COCO's captions: it has no columns", "Leave them out")
    try:
        annotations = json.load(file)["annotations"]
        if not isinstance(annotations, list):
            raise TypeError
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{name}' is not JSON: {error}", "A JSON object a line goes into a .jsonl file") from error
    except (KeyError, TypeError) as error:
        hint = "One such is annotations/captions_train2017.json"
        raise ConfigError(f"'{name}' is not a file of COCO's captions: it has no list 'annotations'", hint) from error
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict):
            raise ConfigError(f"{place_in(name, number)} is not a JSON object", 'It should be {..., "caption": "..."}')
        yield number, value_of(annotation, "caption", name, number), None


def tar_rows(file: BinaryIO, name: str, column: str | None, score_column: str | None) -> Iterator[Row]:
    """The captions of a webdataset in img2dataset's layout: of each sample `KEY.txt`, else "caption" in `KEY.json`.

    `column` and `score_column` are keys of `KEY.json`. Images are skipped, not read.
    """
    for key, texts, _ in samples_of(file, name):
        yield row_of(key, texts, name, column, score_column)


def row_of(key: str, texts: dict[str, bytes], name: str, column: str | None, score_column: str | None) -> Row:
    """The row of one sample, by its .txt and .json."""
    needs_json = column is not None or score_column is not None or "txt" not in texts
    if needs_json and "json" not in texts:
        has = f"'{key}.json'" if "txt" in texts else f"'{key}.txt' and no '{key}.json'"
        raise ConfigError(f"{place_in(name, key)} has no {has}", "Write the shard again with its captions")
    meta = json_object(decoded(texts["json"], name, f"{key}, .json"), name, f"{key}, .json") if needs_json else {}
    score = value_of(meta, score_column, name, key) if score_column else None
    if column is None and "txt" in texts:
        return key, decoded(texts["txt"], name, f"{key}, .txt"), score
    return key, value_of(meta, column or "caption", name, key), score


def samples_of(file: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, bytes], tuple[int, int] | None]]:
    """Each sample's key, its .txt and .json, and where its image is, if it has one: the first byte and the size.

    A sample's members are neighbours in the tar with one name up to its first dot.
    """
    key, parts, image = "", dict[str, bytes](), None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps what it has read
                found = SAMPLE.fullmatch(member.name)
                if found is None or not member.isreg():
                    continue
                if found[1] != key:
                    if key:
                        yield key, parts, image
                    key, parts, image = found[1], {}, None
                ending = found[2].lower()
                if ending in parts:
                    raise ConfigError(f"{place_in(name, key)} has its .{ending} twice", "Write the shard again")
                if ending in ("txt", "json"):
                    content = tar.extractfile(member)
                    parts[ending] = content.read() if content else b""
                elif f".{ending}" in IMAGES:
                    image = member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile lets pass
                raise tarfile.ReadError(f"it has no end after sample {key}")
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"'{name}' is not a whole tar: {error}", "Fetch or write it again") from error
    if key:
        yield key, parts, image


# --- values -----------------------------------------------------------------------------------------------------------


def decoded(data: bytes, name: str, place: int | str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        message = f"{place_in(name, place)} is not UTF-8: its byte {error.start + 1} is 0x{data[error.start]:02x}"
        raise ConfigError(message, "Write the shard again, with UTF-8") from error


def json_object(text: str, name: str, place: int | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{place_in(name, place)} is not JSON: {error}", "Write one whole JSON object there"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{place_in(name, place)} is not a JSON object", 'It should be {"caption": "..."} or the like'
        )
    return value


def value_of(row: dict[str, Any], key: str, name: str, place: int | str) -> Any:
    if key not in row:
        raise ConfigError(f"{place_in(name, place)} has no '{key}'", f"It has: {', '.join(row)}" if row else "")
    return row[key]


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


READERS: dict[str, Callable[[BinaryIO, str, str | None, str | None], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
    ".json": coco_rows,
    ".tar": tar_rows,
}
PLACES = {".parquet": "row", ".json": "annotation", ".tar": "sample"} | dict.fromkeys(IMAGES, "sample")
"""What a row's place is called, where it is not a line."""
