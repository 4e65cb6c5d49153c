"""Images side by side on one sheet, with captions or without."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from instaflow.couplings.contact_sheet import GAP, INK, LINE, LINES, PAPER, font, wrapped

VISIBLE = 128  # pixels: smaller images are enlarged to about this
READABLE = 256  # pixels, where words stand below


def sheet(images: Sequence[Image.Image], *, columns: int | None = None, captions: Sequence[str] = ()) -> Image.Image:
    """Images of one size in rows of `columns`, by default as near to a square as their number allows.

    Small ones are enlarged by a whole factor, pixel by pixel, so that they can be looked at. With captions each stands
    below its image, in two lines at most.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    tiles = [enlarged(image, READABLE if captions else VISIBLE) for image in images]
    width, height = tiles[0].size
    gap, below = (GAP, GAP + LINES * LINE) if captions else (0, 0)
    across, down = width + gap, height + gap + below
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * across + gap, rows * down + gap), PAPER if captions else "black")
    draw = ImageDraw.Draw(whole)
    for place, tile in enumerate(tiles):
        x, y = gap + place % columns * across, gap + place // columns * down
        whole.paste(tile, (x, y))
        for line, text in enumerate(wrapped(captions[place], width) if captions else []):
            draw.text((x, y + height + gap + line * LINE), text, INK, font(16))
    return whole


def enlarged(image: Image.Image, visible: int) -> Image.Image:
    """The image as many times as large as fits into so many pixels, pixel by pixel."""
    factor = max(1, visible // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
