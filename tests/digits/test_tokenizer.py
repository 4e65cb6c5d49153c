import pytest
from transformers import CLIPTokenizer

from instaflow.digits.captions import TRAINED, UNSEEN
from instaflow.digits.grid_captions import evaluation_prompts, training_prompts
from instaflow.digits.tokenizer import build_tokenizer

MAX_LENGTH = 10

FOREIGN = ["", "Seven", "a  SEVEN", "naïve café", "数字の七", "seven's 77 eggs!", "\U0001f600 a\tb", "thirteenth"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_of_a_caption_is_one_token(tokenizer):
    for caption in [*TRAINED, *UNSEEN]:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= MAX_LENGTH
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_every_word_of_a_grid_s_caption_is_one_token():
    tokenizer = build_tokenizer("digits-grid")
    for caption in [*training_prompts(), *evaluation_prompts(400)]:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= tokenizer.model_max_length == 20


def test_captions_have_different_tokens(tokenizer):
    captions = [*TRAINED, *UNSEEN]
    assert len({tuple(tokenizer(caption).input_ids) for caption in captions}) == len(captions)


@pytest.mark.parametrize("text", FOREIGN)
def test_any_text_is_spelled_without_unknown_tokens(tokenizer, text):
    start, *pieces, end = tokenizer(text).input_ids
    assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in pieces
    assert tokenizer.decode(pieces).split() == tokenizer.decode(tokenizer(text.lower()).input_ids[1:-1]).split()
    assert "".join(tokenizer.decode(pieces).split()) == "".join(text.lower().split())


def test_prompts_are_padded_and_cut_to_the_models_length(tokenizer):
    ids = tokenizer(["", "a seven " * 20], padding="max_length", truncation=True).input_ids
    assert [len(row) for row in ids] == [MAX_LENGTH, MAX_LENGTH]
    assert ids[0][1:] == [tokenizer.eos_token_id] * (MAX_LENGTH - 1)


def test_saving_and_loading_keeps_the_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_LENGTH
    for text in [*TRAINED, *UNSEEN, *FOREIGN]:
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_two_tokenizers_have_the_same_files(tmp_path):
    for name in ("one", "two"):
        build_tokenizer().save_pretrained(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
