"""The miniature's tokenizer: CLIP's byte-pair encoding, learned from nothing but the captions' words."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from . import captions, grid_captions

MAX_LENGTH = {"digits": 10, "digits-grid": 20}  # tokens of a prompt, start and end included
CAPTIONS = {"digits": list(captions.TRAINED), "digits-grid": grid_captions.training_prompts()}


def build_tokenizer(data: str = "digits") -> CLIPTokenizer:
    """A small CLIPTokenizer: each word of the captions is one token, any other text falls into smaller pieces.

    The alphabet is CLIP's, all 256 bytes inside and at the end of a word, so every UTF-8 prompt has tokens.
    """
    merges = _learned_merges(sorted({word for caption in CAPTIONS[data] for word in caption.split()}))
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH[data])  # type: ignore[arg-type]


def _learned_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in the order of their rank, that join every one of `words` into a single token.

    The most frequent pair first (Sennrich et al., arXiv 1508.07909), the alphabetically first of equals.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_joined(symbols, best) for symbols in spelled]
    return merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with each neighbouring `pair`, from the left, made one."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
