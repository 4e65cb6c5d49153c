"""What may be asked, and how the rest is refused."""

import json
from typing import Any

import pytest

from instaflow.serving.requests import LONGEST_BODY, LONGEST_PROMPT, RULES, ImageRequest, Refused, parse


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


WHOLE = "must be a whole number from 0 to 2^63 - 1, not"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, f"'seed' {WHOLE} -1"),
        ({"seed": 2**63}, f"'seed' {WHOLE} 9223372036854775808"),
        ({"seed": 1.5}, f"'seed' {WHOLE} 1.5"),
        ({"seed": True}, f"'seed' {WHOLE} true"),
        ({"seeds": []}, "'seeds' must be a list of 1 to 16 seeds, not a list of 0"),
        ({"seeds": [1] * 17}, "'seeds' must be a list of 1 to 16 seeds, not a list of 17"),
        ({"seeds": [1, -2]}, f"'seeds.1' {WHOLE} -2"),
        ({"seeds": [1], "seed": 1}, "'seeds' stands alone"),
        ({"seed_to": 1}, "'seed_to' and 'position' belong together"),
        ({"position": 0.5}, "'seed_to' and 'position' belong together"),
        ({"seed_to": -1, "position": 0}, f"'seed_to' {WHOLE} -1"),
        ({"seed_to": 1, "position": 1.01}, "'position' must be a number from 0 to 1, not 1.01"),
        ({"num_steps": 0}, "'num_steps' must be a whole number from 1 to 200, not 0"),
        ({"num_steps": 201}, "'num_steps' must be a whole number from 1 to 200, not 201"),
        ({"num_steps": "4"}, "'num_steps' must be a whole number from 1 to 200, not \"4\""),
        ({"guidance_scale": float("nan")}, "'guidance_scale' must be a number from 0 to 100, not NaN"),
        ({"guidance_scale": float("inf")}, "'guidance_scale' must be a number from 0 to 100, not Infinity"),
        ({"guidance_scale": -1}, "'guidance_scale' must be a number from 0 to 100, not -1"),
        ({"prompt": "x" * 20_001}, "'prompt' must be text of at most 20,000 characters, not 20,001 characters"),
        ({"prompt": ["x"] * 1000}, "'prompt' must be text of at most 20,000 characters, not a list of 1,000"),
        ({"client": ""}, "'client' must be text of 1 to 64 characters, not \"\""),
        ({"model": {"x": "y" * 100}}, '\'model\' must be a name, not {"x": "' + "y" * 53 + "…"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(changes, message):
    error = refusal({"prompt": "a seven"} | changes)
    assert error.status == 422
    assert error.message == message
    assert "docs/" not in error.hint  # which the page shows, too


def test_every_key_has_a_rule():
    assert set(RULES) == set(ImageRequest.model_fields)


def test_a_misspelt_key_names_the_nearest():
    error = refusal({"prompt": "x", "gudance_scale": 1})
    assert (error.status, error.hint) == (422, "Did you mean 'guidance_scale'?")
    assert len(refusal({"prompt": "x", "y" * 1000: 1}).message) < 100


def test_a_missing_prompt_is_told():
    assert refusal({}).message == "'prompt' is missing"


@pytest.mark.parametrize("body", [b"", b"{", b"prompt=x", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}'])
def test_what_is_no_json_is_a_bad_request(body):
    assert refusal(body).status == 400


@pytest.mark.parametrize("body", [b"[]", b"1", b'"prompt"', b"null"])
def test_another_value_than_an_object_is_refused(body):
    error = refusal(body)
    assert error.status == 422
    assert error.message.startswith("The body must be an object, not ")
