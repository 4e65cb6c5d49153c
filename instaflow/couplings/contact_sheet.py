"""A contact sheet: images in pairs, side by side, with index and prompt."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels of an image's longer side
GAP, MARGIN = 8, 40  # pixels between the two of a pair, and around pairs
LINE = 24  # pixels of a line of text
LINES = 2  # of a prompt
COLUMNS = 3
PAPER, INK, FAINT = "#ffffff", "#1b1b1b", "#8a8a8a"


@dataclass(frozen=True)
class Pair:
    """A coupling to look at: its noise and image, say, or its image and another."""

    index: int
    prompt: str
    left: np.ndarray  # [H, W, 3] uint8
    right: np.ndarray  # [H, W, 3] uint8, perhaps of another size


def contact_sheet(title: str, subtitle: str, pairs: list[Pair]) -> Image.Image:
    """The pairs in rows of up to three, under a title and a fainter line on what is seen."""
    columns = min(COLUMNS, len(pairs))
    tiles = [(fitted(pair.left), fitted(pair.right)) for pair in pairs]
    side = max(tile.width for both in tiles for tile in both)
    height = max(tile.height for both in tiles for tile in both)
    numbers = [f"{pair.index:,}  " for pair in pairs]
    indents = [round(font(16).getlength(number)) for number in numbers]
    across = 2 * side + GAP
    captions = [wrapped(pair.prompt, across - indent) for pair, indent in zip(pairs, indents, strict=True)]
    down = height + GAP + LINE * max(1, *map(len, captions)) + MARGIN
    top = MARGIN + 3 * LINE
    words = max(font(26).getlength(title), font(16).getlength(subtitle))
    width = MARGIN + max(columns * (across + MARGIN), round(words) + MARGIN)
    sheet = Image.new("RGB", (width, top + -(-len(pairs) // columns) * down), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, INK, font(26))
    draw.text((MARGIN, MARGIN + 26), subtitle, FAINT, font(16))
    for place, (left, right) in enumerate(tiles):
        x, y = MARGIN + place % columns * (across + MARGIN), top + place // columns * down
        sheet.paste(left, (x, y))
        sheet.paste(right, (x + side + GAP, y))
        y += height + GAP
        draw.text((x, y), numbers[place], FAINT, font(16))
        for line, text in enumerate(captions[place] or ["no prompt"]):
            draw.text((x + indents[place], y + line * LINE), text, INK if captions[place] else FAINT, font(16))
    return sheet


def colours(noise: np.ndarray) -> np.ndarray:
    """Noise [C, h, w] as uint8 [h, w, 3]: its first three channels, from -3 (none) to 3 (full); one alone is grey."""
    channels = noise[[0, 1, 2] if len(noise) > 2 else [0, 0, 0]].astype(np.float32)
    shown: np.ndarray = np.clip((channels + 3) / 6 * 255, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)
    return shown


def fitted(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 3] with its longer side a tile's; of one that is enlarged each pixel is seen."""
    image = Image.fromarray(pixels)
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def wrapped(text: str, width: float) -> list[str]:
    """The text in up to `LINES` lines of `width` pixels; what is cut ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(16).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])]
    return [cut(line, width) for line in lines]


def cut(text: str, width: float) -> str:
    """The text as far as it fits, with an ellipsis in place of the words that don't."""
    if font(16).getlength(text[: int(width)]) <= width >= len(text):
        return text
    text = text[: int(width)]  # no letter is narrower than a pixel: don't measure a book
    while text and font(16).getlength(text + "…") > width:
        text = text[:-1]
    return (text.rpartition(" ")[0] or text).rstrip(" ,.;:-—") + "…"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """A font with most alphabets' letters, which comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
