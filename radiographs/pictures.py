"""Decodes PNG, JPEG and TIFF images, and streams of JPEG in DICOM files."""

import io
import re
import struct
import sys
import zlib
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image

from .errors import DAMAGED, UnreadableImage, add_note, check_size, decoding_errors
from .greyscale import luminance, unit_range, without_outliers

PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"
SIGNATURES = PNG, JPEG, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # the last four are TIFF and BigTIFF
OTHER_KINDS = {  # first bytes of images that are named as what they are
    rb"RIFF....WEBP": "WebP", rb"BM.{4}\0{4}": "BMP", rb"GIF8[79]a": "GIF",
    rb"\0{3}\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000", rb".{4}ftyp(hei|hev|mif|avif)": "HEIF",
}
OTHER_JPEG = "Unsupported JPEG data precision", "Unsupported color conversion request"
MAX_SURPLUS = 16  # bytes that may follow a complete image; more of them mean that it is not
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
# layouts of 16-bit samples: where Pillow looks for their high bytes, it finds the low ones
LOW_BYTES = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}


def other_kind(start: bytes) -> str:
    """Why a file that begins like this is not read, if it is an image of another kind; else ""."""
    for signature, name in OTHER_KINDS.items():
        if re.match(signature, start, re.DOTALL):
            return f"is a {name} image, which is not read: save it as PNG"
    return ""


def picture_frame(content: bytes) -> Image.Image:
    """First frame of a PNG, JPEG or TIFF file as a Pillow image `F` in 0..1, upright, without
    alpha. Of its metadata only EXIF's orientation matters, and the rest may be broken."""
    with decoding_errors():
        is_grey_with_alpha = content.startswith(PNG) and content[24:26] == b"\x10\x04"
        if content.startswith(PNG):
            content = _bare_png(content)
        elif content.startswith(JPEG):
            content = _bare_jpeg(content)
        image, pages = _open(content)
        check_size(*image.size, pages)
        if content.startswith(JPEG):
            check_jpeg(content)
        is_deep_colour = _is_deep_colour(image)
        pixels = _load(image)
        if is_deep_colour:
            image, _ = _open(content)
            image.tile = [_low_bytes(tile) for tile in image.tile]
            pixels = pixels.astype(np.uint16) << 8 | _load(image)
        elif is_grey_with_alpha:  # four bytes, of which the first two are the grey value
            pixels = pixels[..., 0].astype(np.uint16) << 8 | pixels[..., 1]
    return Image.fromarray(unit_range(without_outliers(luminance(pixels))))


def _bare_png(png):
    """A PNG file with its critical chunks and orientation alone. One of 16-bit grey and alpha, of
    which Pillow would drop the low byte, becomes one of four samples of 8 bits."""
    kept, start = [png[:8]], 8
    while start + 8 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        if name == b"IHDR" and png[24:26] == b"\x10\x04":
            header = png[start + 4:24] + b"\x08\x06" + png[26:29]
            kept.append(png[start:start + 4] + header + struct.pack(">I", zlib.crc32(header)))
        elif name[:1].isupper() or name == b"eXIf":
            kept.append(png[start:start + 12 + length])
        start += 12 + length
    return b"".join(kept)


def _bare_jpeg(jpeg):
    """A JPEG file without the application's segments and comments, but for those on its colours
    and orientation."""
    kept, start = [jpeg[:2]], 2
    while start + 4 <= len(jpeg):
        fill, marker, length = struct.unpack_from(">BBH", jpeg, start)
        if fill != 0xFF or not 0xC0 <= marker <= 0xFE or marker == 0xDA:
            break
        segment = jpeg[start:start + 2 + length]
        if not 0xE1 <= marker < 0xEE and marker != 0xFE or segment[4:8] == b"Exif":
            kept.append(segment)
        start += len(segment)
    return b"".join(kept) + jpeg[start:]


def _open(content):
    """The image at the first page that is not marked as a reduced copy, or the largest if all are,
    and how many there are that are not."""
    image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "TIFF"])
    if image.format != "TIFF":
        return image, 1
    sizes, whole = [], []
    for number in range(image.n_frames):
        image.seek(number)
        sizes.append(image.width * image.height)
        if not image.tag_v2.get(254, 0) & 1:
            whole.append(number)
    image.seek(whole[0] if whole else sizes.index(max(sizes)))
    return image, len(whole)


def _is_deep_colour(image):
    """Whether several samples of 16 bits make up a pixel, of which Pillow keeps the high bytes.
    Refuses arrangements whose low bytes cannot be had either."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))
        is_deep = len(bits) > 1 and max(bits) > 8
        if is_deep and (image.mode not in ("RGB", "RGBA") or image.tag_v2.get(284, 1) != 1):
            raise UnreadableImage("holds samples of 16 bits in an arrangement that cannot be read: "
                                  "save it as a grey PNG of 16 bits")
        return is_deep
    return image.mode in ("RGB", "RGBA") and "16" in str(image.tile[0].args)


def _low_bytes(tile):
    """The tile with the layout of samples of which Pillow keeps the low byte of 16 bits instead of
    the high one."""
    layout, *others = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    mode, _, kind = layout.partition(";")
    return tile._replace(args=(f"{mode};{LOW_BYTES[kind]}", *others))


def _load(image):
    """Pixels (height, width[, samples]) upright and without alpha; white is the highest value."""
    is_deep = image.mode.startswith("I;16")
    is_inverted = is_deep and image.format == "TIFF" and image.tag_v2.get(262) == 0
    image.info.pop("xmp", None)  # of which nothing is needed
    image.load()  # which turns TIFF images upright
    try:
        orientation = image.getexif().get(274)
    except Exception:  # broken metadata
        orientation = None
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if not is_deep and image.mode not in ("L", "I", "F"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    pixels = np.asarray(image)
    # as MONOCHROME1; Pillow inverts such files of 8 bits itself
    return np.negative(pixels, dtype=np.float32) if is_inverted else pixels


def check_jpeg(stream: bytes) -> None:
    """Refuses a JPEG stream of which part is lost; other decoders fill it with grey."""
    grey_jpeg(stream, (1, 1))


def grey_jpeg(stream: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Pixels uint8 (height, width) of a JPEG stream; None if it is not one of 8 bits that can be
    turned grey.

    Decodes at 1/2, 1/4 or 1/8 of the full size, but not below `size` (width, height). Raises
    UnreadableImage if part of the stream is lost; a few bytes too many are a note.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(stream)
    except ValueError:
        return None
    times = max(min(width // size[0], height // size[1]), 1)
    parts = next(number for number in (8, 4, 2, 1) if number <= times)
    decode = partial(simplejpeg.decode_jpeg, stream, "GRAY", min_height=-(-height // parts),
                     min_width=-(-width // parts), min_factor=1)
    try:
        return decode()[..., 0]
    except ValueError as error:
        text = str(error)
    if text.startswith(OTHER_JPEG):
        return None
    surplus = re.match(r"Corrupt JPEG data: (\d+) extraneous bytes", text)
    if not surplus or int(surplus[1]) > MAX_SURPLUS:
        raise UnreadableImage(f"{DAMAGED} ({text})")
    add_note("has bytes in its JPEG stream that do not belong to it, and may be damaged")
    return decode(strict=False)[..., 0]
