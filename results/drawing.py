"""Draws a radiograph with its mask, its predicted and its true boxes."""

import io
import textwrap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours

from cli import DISK_ERRORS, atomic_write
from metrics import Thresholds, find_boxes, rescale_boxes
from radiographs import Radiograph

from .layout import picture_path

IMAGE_SIZE = 1024  # pixels of the longest side, unless said otherwise
LEGIBLE, NARROWEST = 400, 48  # pixels; minimum of the longest and of the shortest side
STYLES = {  # lines: RGB colour, distinct without colour vision; whether it is dashed
    "truth": ((86, 180, 233), False), "prediction": ((240, 228, 66), True),
    "mask": ((230, 159, 0), False)}
GREYS = 252  # of the palette; the colours of STYLES follow them
BLACK, WHITE = 0, GREYS - 1
PALETTE = np.vstack([np.linspace(0, 255, GREYS)[:, None].repeat(3, axis=1),
                     [colour for colour, _ in STYLES.values()]]).round().astype(np.uint8).tobytes()
PictureUser = Callable[["Overlay", Image.Image], None]
WAITING = 32  # pictures that may wait to be drawn; more would fill the memory


class Overlay(NamedTuple):
    """One image and what was found in it; boxes in original pixels."""
    patient_id: str
    image: np.ndarray  # uint8 (height, width) for display
    mask: np.ndarray  # (S, S) probabilities
    boxes: np.ndarray  # (n, 4) predicted
    confidences: np.ndarray  # (n,)
    original_size: tuple[int, int]  # (height, width)
    truth: np.ndarray | None = None  # (m, 4) true boxes, if they are known
    thresholds: Thresholds | None = None  # none where nothing was predicted
    model: str = ""  # its name


def make_overlay(patient_id: str, radiograph: Radiograph, mask: np.ndarray,
                 thresholds: Thresholds, truth: np.ndarray | None = None) -> Overlay:
    """The Overlay of a mask (S, S) on the radiograph's display or, if it has none, its image."""
    image = radiograph.image if radiograph.display is None else radiograph.display
    boxes, confidences = find_boxes(mask, radiograph.original_size, thresholds)
    return Overlay(patient_id, image, mask, boxes, confidences, radiograph.original_size, truth,
                   thresholds)


def draw_overlay(overlay: Overlay, *, legend: bool = True) -> Image.Image:
    """Draws the radiograph with true boxes (solid), predicted ones (dashed) and the outline of the
    mask at the box threshold; below it a `legend` of what is drawn, and the caption.

    Returns mode "P", as large as `image`, but at least LEGIBLE, at the original's aspect.
    """
    picture = _shade(overlay)
    lines = {"mask": _outlines(overlay, picture.size),
             "truth": _rectangles(overlay, overlay.truth, picture.size),
             "prediction": _rectangles(overlay, overlay.boxes, picture.size)}
    for name, shapes in lines.items():
        for points in shapes:
            _trace(picture, points, name)
    for points, confidence in zip(lines["prediction"], overlay.confidences):
        _label(picture, points[0], f"{confidence:.2f}")
    names = [name for name in lines if len(lines[name])] if legend else []
    footer = _footer(overlay, max(picture.width, LEGIBLE), names)
    canvas = Image.new("L", (footer.width, picture.height + footer.height))
    canvas.paste(picture)
    canvas.paste(footer, (0, picture.height))
    canvas.putpalette(PALETTE)
    return canvas


def _shade(overlay):
    """The image as indices of greys in the palette."""
    height, width = overlay.original_size
    scale = max(*overlay.image.shape, LEGIBLE) / max(height, width)
    size = max(round(width * scale), NARROWEST), max(round(height * scale), NARROWEST)
    image = Image.fromarray(overlay.image).resize(size, Image.Resampling.BILINEAR)
    return image.point([value * GREYS // 256 for value in range(256)])


def _outlines(overlay, size):
    """Lines (n, 2) of x, y around the mask at the box threshold; none if no boxes were found."""
    if not len(overlay.boxes):
        return []
    scale = np.divide(size, overlay.mask.shape[::-1])
    contours = find_contours(np.pad(overlay.mask, 1), overlay.thresholds.box)
    return [(contour[:, ::-1] - 0.5) * scale for contour in contours]


def _rectangles(overlay, boxes, size):
    """Closed lines (n, 5, 2) of x, y around boxes; none if the boxes are unknown."""
    if boxes is None:
        return []
    x, y, w, h = rescale_boxes(boxes, overlay.original_size, size[::-1]).T
    return np.stack([[x, x + w, x + w, x, x], [y, y, y + h, y + h, y]]).T


def _trace(picture, points, name):
    """Draws the line of this name through points (n, 2), edged in black to stand out on bright
    pixels."""
    colour, is_dashed = GREYS + list(STYLES).index(name), STYLES[name][1]
    draw = ImageDraw.Draw(picture)
    pen = max(round(max(picture.size) / 512), 2)
    points = np.clip(points, 0, np.subtract(picture.size, 1))
    draw.line(points.ravel().tolist(), BLACK, pen + 2)
    for piece in _dashes(points, 5 * pen) if is_dashed else [points]:
        draw.line(piece.ravel().tolist(), colour, pen)


def _dashes(points, length):
    for start, end in zip(points, points[1:]):
        count = max(round(np.abs(end - start).max() / length / 2), 1)
        for index in range(count):
            yield start + (end - start) * np.array([[index], [index + 0.5]]) / count


def _label(picture, corner, text):
    """Draws white text on black above a corner, or at the top where there is no room."""
    draw = ImageDraw.Draw(picture)
    font = _font(picture.width)
    width, height = font.getlength(text) + 6, font.size + 4
    x = np.clip(corner[0], 0, max(picture.width - width, 0))
    y = corner[1] - height if corner[1] >= height else 0
    draw.rectangle([x, y, x + width, y + height], fill=BLACK)
    draw.text((x + 3, y + height / 2), text, WHITE, font, anchor="lm")


@lru_cache
def _font(width):
    return ImageFont.load_default(max(width // 64, 12))


def _footer(overlay, width, names):
    """The strip below a picture: a legend of `names`, then the caption."""
    font = _font(width)
    row, indent = font.size * 3 // 2, font.size // 2
    lines = _caption(overlay, font, width - 2 * indent)
    strip = Image.new("L", (width, row * (len(lines) + bool(names))))
    write = partial(ImageDraw.Draw(strip).text, fill=WHITE, font=font, anchor="lm")
    x, y = indent, row // 2
    for name in names:
        _trace(strip, np.array([[x, y], [x + 3 * font.size, y]]), name)
        write((x + 3.5 * font.size, y), name)
        x += 4.5 * font.size + font.getlength(name)
    for number, line in enumerate(lines, bool(names)):
        write((indent, (number + 0.5) * row), line)
    return strip


def _caption(overlay, font, width):
    """The id, model and thresholds as lines of text that fit into `width` pixels."""
    texts = [overlay.patient_id, overlay.model, str(overlay.thresholds or "")]
    if overlay.thresholds and not len(overlay.boxes):
        texts[0] += ", no opacity found"
    lines = []
    for text in filter(None, texts):
        fitting = int(len(text) * width / font.getlength(text)) - 1
        lines += textwrap.wrap(text, max(fitting, 1), max_lines=3, placeholder=" ...")
    return lines


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file of a picture."""
    content = io.BytesIO()
    picture.save(content, format="PNG", compress_level=1)  # 6 saves a tenth in three times the time
    return content.getvalue()


def save_overlay(folder: Path | None, overlay: Overlay, also: PictureUser | None = None) -> None:
    """Draws a picture, hands it to `also`, if there is such a function, and writes it to
    `folder`/<patient_id>.png, if there is a folder."""
    picture = draw_overlay(overlay)
    if also:
        also(overlay, picture)
    if folder:
        content = encode_png(picture)
        save_file(picture_path(folder, overlay.patient_id), lambda file: file.write(content))


def save_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Lets `write` fill a file of results; prints a warning unless the disk itself is at fault."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=False) as file:  # it can be made again
            write(file)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        print(f"warning: no {path.name}: {error.strerror}")


@contextmanager
def picture_writer(folder: Path | None,
                   also: PictureUser | None = None) -> Iterator[Callable[[Overlay], None]]:
    """Yields a function that lets threads draw and write the picture of an overlay, as save_overlay
    does; when the block ends, all are written. Without folder and `also` it does nothing."""
    waiting = deque()

    def write(overlay: Overlay) -> None:
        waiting.append(threads.submit(save_overlay, folder, overlay, also))
        if len(waiting) > WAITING:
            waiting.popleft().result()

    with ThreadPoolExecutor(2) as threads:
        yield write if folder or also else lambda overlay: None
        for drawing in waiting:
            drawing.result()
