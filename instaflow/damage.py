"""What a file of weights tells of its own damage: by its length, its header or its table of contents, unread."""

import json
import zipfile
from pathlib import Path

HEADER = 100_000_000
"""Bytes that safetensors' header has at most, by its format."""
TOLD = 40
"""Characters of a text that are shown."""


def damage_of(file: Path) -> str:
    """What is wrong with a .safetensors file or one of torch's, in words that follow "it"; empty where all seems well.

    A cut or an empty file is found, a lengthened .safetensors, and one of another kind, such as a proxy's page under
    this name. Bytes that were exchanged, and what torch wrote before it wrote zips, only a hash would tell.
    Raises OSError.
    """
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        return "is empty"
    if text := text_in(start):
        return f"is a text, such as a server's page or a pointer of git-lfs, and begins with {text!r}"
    return damage_of_safetensors(file) if file.suffix == ".safetensors" else damage_of_zip(file, start)


def text_in(start: bytes) -> str:
    """The first line of a file that begins with these bytes, if it is one of text."""
    text = start.decode("ascii", errors="replace")
    is_text = all(sign.isprintable() or sign in "\r\n\t" for sign in text.replace("\ufffd", "?"))
    return text.strip().partition("\n")[0].strip()[:TOLD] if is_text else ""


def damage_of_safetensors(file: Path) -> str:
    """By its header, whose offsets tell the file's exact length."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > HEADER:
            return "is no safetensors file"
        content = opened.read(length)
    if len(content) < length:
        return f"is cut off within its header, after {size:,} bytes"
    try:
        header = json.loads(content)
        tensors = [told for name, told in header.items() if name != "__metadata__"]
        whole = 8 + length + max(end for _, end in (told["data_offsets"] for told in tensors))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is no safetensors file: its header cannot be read, or tells of no tensor"
    if size < whole:
        return f"is cut off: it has {size:,} of {whole:,} bytes"
    return f"has {size:,} bytes, and its header tells of {whole:,}" if size > whole else ""


def damage_of_zip(file: Path, start: bytes) -> str:
    """By the table of contents, which stands at the end."""
    if start[:1] == b"\x80":  # a pickle, as torch wrote before 1.6
        return ""
    if not start.startswith(b"PK\x03\x04"):
        return "is no file of torch's"
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            archive.open(names[0]).close()  # is it where the table says
    except (zipfile.BadZipFile, ValueError, OSError, IndexError, RuntimeError):
        return f"is cut off after {file.stat().st_size:,} bytes, or has lost some"
    return "" if any(name.endswith("data.pkl") for name in names) else "is a zip, and none of torch's"
