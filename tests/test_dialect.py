"""YAML without its traps."""

import pytest

from instaflow.dialect import parse_yaml
from instaflow.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2E3", 2000.0),
        ("+1.5e+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, [a, 2.0]]", [1, ["a", 2.0]]),
    ],
)
def test_numbers_and_constants_are_what_they_look_like(text, value):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "yes",
            "no",
            "on",
            "off",
            "Yes",
            "NO",
            "y",
            "n",
            "tRue",
            "2024-01-31",
            "2024-01-31T10:00:00Z",
            "1:30",
            "12:30:45",
        ),
        *(
            "1:2.5",
            "012",
            "0x10",
            "0o17",
            "0b1",
            "2rf",
            "1e",
            "1e-",
            "e5",
            ".e3",
            ".",
            "_1",
            ".inf",
            ".nan",
            "=",
            "a=b",
        ),
    ],
)
def test_what_looks_odd_is_text(text):
    assert parse_yaml(text, "here") == text
    assert parse_yaml(f"[{text}]", "here") == [text]


def test_keys_are_text():
    assert list(parse_yaml("{2024: a, 1e3: a, 2rf: a, true: a, null: a}", "here")) == [
        "2024",
        "1e3",
        "2rf",
        "true",
        "null",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ("line 3", "'a' stands twice")),
        ("a:\n  b: 1\n  'b': 2", ("line 3", "'b' stands twice")),
        ("{1: a, '1': b}", ("'1' stands twice",)),
        ("a: 1\n? [b]\n: 2", ("line 2", "a key must be a single word")),
        ("a:\n\tb: 1", ("line 2", "'\\t'")),
        ("a: [1, 2", ("not valid YAML",)),
        ("a: 1\n---\nb: 2", ("line 2", "another document")),
        ("a: !!python/object:os.system {}", ("line 1", "python")),
        ("a: !!int eight", ("'!!' tag",)),
        ("a: !!bool maybe", ("'!!' tag",)),
        ("a: !!timestamp soon", ("'!!' tag",)),
        ("a: &x {b: *x}", ("recursive",)),
        ("a: \0", ("#x0000",)),
        ("a: " + 3000 * "[" + 3000 * "]", ("nested too deeply",)),
    ],
)
def test_bad_yaml_is_refused_with_its_place(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "'file.yaml'")
    assert caught.value.message.startswith("'file.yaml'")
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message
