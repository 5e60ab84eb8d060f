"""The one picture of an image, its mask and its boxes, for the scripts and the notebooks."""

import errno
import io
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import atomic_write
from metrics import rescale_boxes

WIDTH, LEGEND_HEIGHT, CAPTION_HEIGHT = 512, 24, 20  # pixels
TRUTH, PREDICTION, HEAT = (64, 220, 120), (255, 208, 48), (255, 72, 32)  # RGB
DASH = 8  # pixels of a dash, and between two
WAITING = 64  # pictures that wait to be drawn; more would fill the memory
NAME_ERRORS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ,
               errno.EINVAL}


class Overlay(NamedTuple):
    """What draw_overlay draws; boxes in original pixels."""
    image: np.ndarray  # uint8 (S, S), as the network sees it
    mask: np.ndarray  # (S, S) probabilities
    boxes: np.ndarray  # (n, 4) predicted
    confidences: np.ndarray  # (n,)
    original_size: tuple[int, int]  # (height, width)
    truth: np.ndarray | None = None  # (m, 4) true boxes, if they are known
    caption: str = ""


def draw_overlay(overlay: Overlay) -> Image.Image:
    """The image under a veil of its mask, with boxes, legend and caption, WIDTH pixels wide at the
    original aspect."""
    original_size = overlay.original_size
    height = int(np.clip(round(WIDTH * original_size[0] / original_size[1]), 16, 4 * WIDTH))
    size = (WIDTH, height)
    canvas = Image.new("RGB", (WIDTH, height + LEGEND_HEIGHT + CAPTION_HEIGHT))
    canvas.paste(Image.fromarray(overlay.image).resize(size, Image.Resampling.BILINEAR))
    veil = Image.fromarray((overlay.mask * 140).astype(np.uint8))
    canvas.paste(HEAT, (0, 0), veil.resize(size, Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(canvas)
    truth = overlay.truth if overlay.truth is not None else []
    for x, y, w, h in rescale_boxes(truth, original_size, (height, WIDTH)):
        draw.rectangle([x, y, x + w, y + h], outline=TRUTH, width=2)
    boxes = rescale_boxes(overlay.boxes, original_size, (height, WIDTH))
    for (x, y, w, h), confidence in zip(boxes, overlay.confidences):
        _dashed_rectangle(draw, x, y, x + w, y + h)
        draw.text((x + 3, max(y - 17, 1)), f"{confidence:.2f}", PREDICTION, _font(14),
                  stroke_width=1, stroke_fill="black")
    canvas.paste(_legend(overlay.truth is not None), (0, height))
    caption_middle = height + LEGEND_HEIGHT + CAPTION_HEIGHT // 2
    draw.text((8, caption_middle), overlay.caption, "white", _font(12), anchor="lm")
    return canvas


@cache
def _font(size):
    return ImageFont.load_default(size)


def _dashed_rectangle(draw, left, top, right, bottom):
    for x in np.arange(left, right, 2 * DASH):
        for y in (top, bottom):
            draw.line([x, y, min(x + DASH, right), y], PREDICTION, 2)
    for y in np.arange(top, bottom, 2 * DASH):
        for x in (left, right):
            draw.line([x, y, x, min(y + DASH, bottom)], PREDICTION, 2)


@cache
def _legend(with_truth):
    """The strip below a picture: truth, prediction, and the scale of the heat map."""
    strip = Image.new("RGB", (WIDTH, LEGEND_HEIGHT))
    draw, y = ImageDraw.Draw(strip), LEGEND_HEIGHT // 2
    if with_truth:
        draw.line([8, y, 40, y], TRUTH, 2)
        draw.text((46, y), "truth", "white", _font(14), anchor="lm")
    for x in (100, 116):
        draw.line([x, y, x + 8, y], PREDICTION, 2)
    draw.text((132, y), "prediction, confidence", "white", _font(14), anchor="lm")
    draw.text((330, y), "mask probability 0", "white", _font(14), anchor="lm")
    for x in range(40):
        draw.line([452 + x, y - 6, 452 + x, y + 6], tuple(channel * x // 72 for channel in HEAT))
    draw.text((497, y), "1", "white", _font(14), anchor="lm")
    return strip


def encode_overlay(overlay: Overlay) -> bytes:
    """The picture as a PNG file."""
    content = io.BytesIO()
    draw_overlay(overlay).save(content, format="PNG", compress_level=1)  # 3 times faster than 6
    return content.getvalue()


def save_overlay(folder: Path, patient_id: str, overlay: Overlay) -> None:
    """Writes `folder`/<patient_id>.png; a name that the disk does not take is printed."""
    content = encode_overlay(overlay)
    path = folder / os.fsdecode(f"{patient_id}.png".encode())  # UTF-8 whatever the locale
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        print(f"warning: no picture of {patient_id}: {error.strerror}")


def save_overlays(folder: Path, overlays: Iterable[tuple[str, Overlay]]) -> None:
    """Writes the picture of each (patient_id, overlay) as they come, in threads."""
    waiting = deque()
    with ThreadPoolExecutor(2) as drawers:
        for patient_id, overlay in overlays:
            waiting.append(drawers.submit(save_overlay, folder, patient_id, overlay))
            if len(waiting) > WAITING:
                waiting.popleft().result()
        for drawing in waiting:
            drawing.result()
