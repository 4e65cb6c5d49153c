"""What may be asked, and how the rest is refused."""

import json
from typing import Any

import pytest

from instaflow.serving.requests import LONGEST_BODY, LONGEST_PROMPT, Refused, parse


def refusal(body: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.hint
    return caught.value


def test_a_prompt_is_enough():
    asked = parse(b'{"prompt": "a seven"}')
    assert (asked.model, asked.many, asked.num_steps, asked.guidance_scale) == (None, [0], None, None)


def test_several_seeds_are_as_many_images():
    assert parse(b'{"prompt": "", "seeds": [3, 1, 3]}').many == [3, 1, 3]


def test_the_longest_prompt_fits_into_the_longest_body_even_if_all_is_escaped():
    prompt = "🙂" * LONGEST_PROMPT
    body = json.dumps({"prompt": prompt}).encode()
    assert len(body) < LONGEST_BODY
    assert parse(body).prompt == prompt


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "'seed' should be greater than or equal to 0, not -1"),
        ({"seed": 2**63}, "'seed' should be less than"),
        ({"seed": 1.5}, "'seed' should be a valid integer"),
        ({"seed": True}, "'seed' should be a valid integer, not True"),
        ({"seeds": []}, "'seeds'"),
        ({"seeds": [1] * 17}, "'seeds'"),
        ({"seeds": [1], "seed": 1}, "'seeds' stands alone"),
        ({"seed_to": 1}, "'seed_to' and 'position' belong together"),
        ({"position": 0.5}, "'seed_to' and 'position' belong together"),
        ({"seed_to": 1, "position": 1.01}, "'position' should be less than or equal to 1, not 1.01"),
        ({"num_steps": 0}, "'num_steps' should be greater than or equal to 1, not 0"),
        ({"num_steps": 201}, "'num_steps' should be less than or equal to 200, not 201"),
        ({"num_steps": "4"}, "'num_steps' should be a valid integer, not '4'"),
        ({"guidance_scale": float("nan")}, "'guidance_scale' should be a finite number, not nan"),
        ({"guidance_scale": float("inf")}, "'guidance_scale' should be"),
        ({"guidance_scale": -1}, "'guidance_scale' should be greater"),
        ({"prompt": "x" * (LONGEST_PROMPT + 1)}, "'prompt' has more than 20,000 characters"),
        ({"prompt": ["x"] * 1000}, "'prompt' should be a valid string, not ['x', 'x'"),
        ({"client": ""}, "'client'"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(changes, words):
    error = refusal({"prompt": "a seven"} | changes)
    assert error.status == 422
    assert error.message.startswith(words)
    assert len(error.message) < 160


def test_a_misspelt_key_names_the_nearest():
    error = refusal({"prompt": "x", "gudance_scale": 1})
    assert (error.status, error.hint) == (422, "Did you mean 'guidance_scale'?")


def test_a_missing_prompt_is_told():
    assert refusal({}).message == "'prompt' is missing"


@pytest.mark.parametrize("body", [b"", b"{", b"prompt=x", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}'])
def test_what_is_no_json_is_a_bad_request(body):
    assert refusal(body).status == 400


@pytest.mark.parametrize("body", [b"[]", b"1", b'"prompt"', b"null"])
def test_another_value_than_an_object_is_refused(body):
    assert refusal(body).status == 422
