"""Prompts: where they come from, their copy in a couple stage's folder, and which one belongs to an index."""

import hashlib
import json
import logging
from pathlib import Path

from instaflow.couplings.manifest import make_anew
from instaflow.errors import ConfigError, DataError
from instaflow.files import remove_leftovers, write_file

logger = logging.getLogger(__name__)


def read_prompts(source: str | Path | list[str]) -> list[str]:
    """The prompts of a list, as they are, or of a UTF-8 text file, one a line.

    In a list every string counts, the empty one too (it is the prompt of unconditional guidance). In a file blank
    lines are skipped, and a warning tells how many; `#` and spaces are kept; LF and CRLF end a line; a byte order
    mark is dropped. Raises ConfigError where nothing is left or the source can't be read.
    """
    if isinstance(source, list):
        return _checked(source)
    path = Path(source)
    lines = [line.removesuffix("\r") for line in _text_of(path).split("\n")]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f'prompt file "{path}" holds no prompt', "Write one prompt a line.")
    blank = len(lines) - len(prompts) - (lines[-1] == "")  # the newline that ends the file is no blank line
    if blank:
        logger.warning('prompt file "%s": %d blank lines skipped', path, blank)
    return prompts


def prompt_of(prompts: list[str], index: int) -> str:
    """The prompt of record `index`: the prompts in order, again and again."""
    return prompts[index % len(prompts)]


def prompts_hash(prompts: list[str]) -> str:
    """Hex SHA-256 of the prompts in their order."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def save_prompts(folder: Path, prompts: list[str]) -> None:
    """Keep a stage's prompts in its folder: `prompts.json`, since a prompt may contain a newline."""
    path = folder / "prompts.json"
    remove_leftovers(path)
    write_file(path, json.dumps(prompts, indent=0, ensure_ascii=False) + "\n")


def load_prompts(folder: Path) -> list[str]:
    """The prompts that `save_prompts` kept. Raises DataError."""
    path = folder / "prompts.json"
    hint = make_anew(folder)
    try:
        prompts = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror}', hint) from error
    except ValueError as error:
        raise DataError(f'"{path}" is not JSON: {error}', hint) from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f'"{path}" must be a list of at least one string', hint)
    return prompts


def _checked(prompts: list[str]) -> list[str]:
    if not prompts:
        raise ConfigError("the list of prompts is empty", "Give at least one prompt, or the path of a text file.")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt {position} must be a string, not {prompt!r}", "Put it in quotes.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            hint = "Write the character itself instead of its escapes."
            raise ConfigError(f"prompt {position} has half a character (a lone surrogate): {prompt!r}", hint) from error
    return list(prompts)


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f'prompt file "{path}" is a folder', "Name a UTF-8 text file with one prompt a line.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        hint = "Write one prompt a line there; a relative path in an experiment starts at its file."
        raise ConfigError(f'prompt file "{path}" does not exist', hint) from error
    except OSError as error:
        raise ConfigError(f'prompt file "{path}" cannot be read: {error.strerror}', "Check its permissions.") from error
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f'prompt file "{path}" is not UTF-8: byte {error.start} (line {line}) is 0x{data[error.start]:02x}'
        raise ConfigError(message, "Save it as UTF-8, or convert it: iconv -f LATIN1 -t UTF-8.") from error
