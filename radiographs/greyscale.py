"""From the pixels of a grey DICOM frame to displayed grey values.

    stored bits -> padding aside -> modality -> values of interest -> 0..1 with air dark

A display hint that cannot be used is ignored with an ImageWarning.
"""

from typing import NamedTuple

import numpy as np
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from .errors import add_note

NEARLY_ALL = 0.95  # share of the pixels; a transform that turns so many white or black is no use
FEW = 0.01  # share of the pixels that may be outliers, at either end


def _leave_out(hint):
    add_note(f"is read without its {hint}, which cannot be used")


# What the header says; None where it cannot be used


def _numbers(dataset, keyword):
    """All numbers of an element."""
    try:
        return [float(number) for number in np.ravel(dataset[keyword].value)] or None
    except Exception:  # pydicom raises many types on a broken value
        return None


def _number(dataset, keyword):
    """The first number of an element, if it is finite."""
    first, *_ = _numbers(dataset, keyword) or [np.nan]
    return first if np.isfinite(first) else None


def _table(dataset, keyword):
    """The first look-up table of a sequence as (entries, first value mapped).

    PS3.3 C.11.1.1 and C.11.2.1.1: 0 entries mean 65,536; entries of 8 bits come one or two in a
    word of 16, the first of two in the low byte.
    """
    try:
        item = dataset[keyword].value[0]
        count, first, bits = map(int, item.LUTDescriptor)
        data = item.LUTData
        if isinstance(data, bytes):
            order = "<" if dataset.original_encoding[1] else ">"
            data = np.frombuffer(data + bytes(len(data) % 2), f"{order}u2")
        entries = np.array(data, "<u2", ndmin=1)
    except Exception:  # pydicom raises many types on a broken sequence
        return None
    count = count or 2**16
    if bits <= 8 and len(entries) < count:
        entries = entries.view(np.uint8)
    return (entries[:count], first) if len(entries) >= count else None


def text_of(dataset, tag) -> str:
    """Text of an element in capitals, values with a backslash between them; empty if absent."""
    element = dataset.get_item(tag) if tag in dataset else None  # a tenth of the time of get()
    value = element.value if element else ""
    if isinstance(value, MultiValue):
        value = "\\".join(map(str, value))
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip(" \0").upper()


HINTS = {
    "ModalityLUTSequence": _table, "RescaleSlope": _number, "RescaleIntercept": _number,
    "VOILUTSequence": _table, "WindowCenter": _numbers, "WindowWidth": _numbers,
    "VOILUTFunction": text_of, "PixelPaddingValue": _number, "PixelPaddingRangeLimit": _number,
}
HINT_TAGS = {keyword: Tag(keyword) for keyword in HINTS}  # looked up once, not for every file


def display_hints(dataset) -> dict:
    """The display hints that a pydicom dataset has, by keyword: finite numbers, words, lists of
    numbers for windows, and tables as (entries, first value mapped); None where one cannot be
    used."""
    present = [keyword for keyword, tag in HINT_TAGS.items() if tag in dataset]
    return {keyword: HINTS[keyword](dataset, keyword) for keyword in present}


class BitLayout(NamedTuple):
    """Which bits of a pixel cell hold its value (PS3.5 8.1.1), and whether others hold overlays."""
    stored: int
    high: int
    has_overlay: bool


def bit_layout(dataset) -> BitLayout:
    """The BitLayout that a pydicom dataset declares."""
    stored, high = (int(dataset.get(name) or 0) for name in ("BitsStored", "HighBit"))
    positions = [_number(dataset, (group, 0x0102)) or 0 for group in range(0x6000, 0x6020, 2)]
    return BitLayout(stored, high, max(positions) > 0)


def displayed(cells: np.ndarray, layout: BitLayout, hints: dict, *, negative: bool) -> np.ndarray:
    """Grey values of a frame's cells (height, width) on any scale, air dark; padding is NaN.

    `hints` are display_hints(); in a `negative` image low values are bright.
    """
    values = stored_values(cells, layout)
    padding = _padding(values, hints)
    visible = values if padding is None else values[~padding]
    with np.errstate(all="ignore"):
        for stage in STAGES:
            visible = _transform(visible, stage, hints)
    if negative:
        visible = np.negative(visible, dtype=np.float64)
    if padding is None:
        return visible
    result = np.full(values.shape, np.nan)
    result[~padding] = visible
    return result


def stored_values(cells: np.ndarray, layout: BitLayout) -> np.ndarray:
    """The stored bits of each cell, in the type of the cells.

    Bits above them are masked if they hold overlays; otherwise values that use them are kept whole.
    """
    width, bits = 8 * cells.itemsize, layout.stored
    if cells.dtype.kind == "f" or not 0 < bits < width:
        return cells
    shift = max(min(layout.high + 1, width) - bits, 0)
    if shift and not layout.has_overlay and _fits(cells, bits) and (cells & (2**shift - 1)).any():
        add_note(f"declares High Bit {layout.high}, but its values lie below and are not shifted")
        shift = 0
    if not shift and _fits(cells, bits) and cells.dtype.kind == "u":
        return cells
    whole = cells >> shift
    stored = cells << (width - bits - shift) >> (width - bits)  # unused bits now repeat the sign
    if layout.has_overlay or _fits(whole, bits) or (whole == stored).all():
        return stored
    add_note(f"holds values of more than the {bits} bits that it declares; they are used whole")
    return whole


def _fits(cells, bits):
    return cells.min() >= 0 and cells.max() < 2**bits


def _padding(values, hints):
    """Mask of the pixels that are padding (PS3.3 C.7.5.1.1.2); None if there is none to use."""
    for name in ("PixelPaddingRangeLimit", "PixelPaddingValue"):
        ends = [hints.get("PixelPaddingValue"), hints.get(name)]
        if None not in ends and np.abs(ends).max() < 2**32:
            # -2000 may be written as 63536
            low, high = np.sort(np.array(ends).astype(np.int64).astype(values.dtype))
            padding = (values >= low) & (values <= high)
            if _varies(values[~padding]):
                return padding
        if name in hints:
            _leave_out(name)
    return None


def _varies(values):
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return values.size > 0 and values.min() < values.max()


def _transform(values, stage, hints):
    """Applies the first transform of a stage that the file has and that keeps values apart."""
    for name, function, keywords in stage:
        given = [hints.get(keyword) for keyword in keywords]
        if not any(keyword in hints for keyword in keywords) or not _varies(values):
            continue
        candidates = () if None in given else function(values, hints, *given)
        for number, changed in enumerate(candidates, 1):
            if changed is None or not _varies(changed):
                continue
            if not _is_flat(changed) or _is_flat(values):
                if number > 1:
                    add_note(f"is read with window {number} of several: the first cannot be used "
                             "or turns nearly all of it white or black")
                return changed
        _leave_out(name)
    return values


def _is_flat(values):
    """Whether nearly all of an image is white, or black."""
    return max((values == end).mean() for end in (values.min(), values.max())) >= NEARLY_ALL


# The transforms yield values on any scale, a window for each pair of center and width


def _look_up(values, hints, table):
    """PS3.3 C.11.1.1 and C.11.2.1.1: values beyond those mapped get the first or last entry."""
    entries, first = table
    if first >= 2**15 and (values.min() < 0 or values.max() < first):
        first -= 2**16  # a negative number, written as an unsigned one
    index = np.clip(np.rint(values - float(first)), 0, len(entries) - 1)
    yield entries[np.nan_to_num(index).astype(np.intp)]


def _rescale(values, hints, slope, intercept):
    yield values * slope + intercept


def _window(values, hints, centers, widths):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 up to scale and offset; None for a width not allowed."""
    function = hints.get("VOILUTFunction", "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        _leave_out("VOI LUT Function")
        function = "LINEAR"
    for center, width in zip(centers, widths):
        if function == "LINEAR":
            center, width = center - 0.5, width - 1
        if width == 0 and function == "LINEAR":
            yield np.where(values > center, 1.0, 0.0)
        elif width > 0:
            distance = (values - center) / width
            is_curved = function == "SIGMOID"
            yield np.tanh(2 * distance) if is_curved else np.clip(distance, -0.5, 0.5)
        else:
            yield None


STAGES = (  # PS3.3 C.11.1 and C.11.2: (name in notes, function, keywords of its arguments)
    (("Modality LUT", _look_up, ("ModalityLUTSequence",)),
     ("Rescale Slope and Intercept", _rescale, ("RescaleSlope", "RescaleIntercept"))),
    (("VOI LUT", _look_up, ("VOILUTSequence",)),
     ("Window Center and Width", _window, ("WindowCenter", "WindowWidth"))),
)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Grey values (height, width) of pixels (height, width[, samples])."""
    if pixels.ndim == 2:
        return pixels
    add_note("is a colour image; its luminance is used")
    return pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601


def without_outliers(pixels: np.ndarray) -> np.ndarray:
    """The pixels as they are or, if half of their range or more belongs to FEW of them at an end,
    such as hot pixels and burned-in letters, with these cut to the range of the others.

    In 2,574 images of the challenge, the range is 1.93 times that of the middle 98 % at most.
    """
    values = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels.ravel()
    if not values.size:
        return pixels
    sample = np.sort(values[::values.size // 2048 | 1])  # odd, so not in step with the columns
    low, high = (float(sample[round(share * (sample.size - 1))]) for share in (FEW, 1 - FEW))
    span, lowest, highest = high - low, float(values.min()), float(values.max())
    if span == 0 or highest - lowest <= 2 * span:
        return pixels
    others = values[(values >= low - span) & (values <= high + span)]
    low, high = others.min(), others.max()
    if highest - lowest <= 2 * (float(high) - float(low)):
        return pixels
    add_note("has a few pixels far brighter or darker than all others; they are cut to the range "
             "of these")
    return pixels.clip(low, high)


def unit_range(pixels: np.ndarray) -> np.ndarray:
    """Scales to 0..1 float32 by the range of the finite values; zeros if they are all the same.

    Values that are not finite, or whose differences would overflow float32, become 0.
    """
    pixels = pixels.astype(np.result_type(pixels.dtype, np.float32))
    finite = np.abs(pixels) < 1e38
    if not finite.all():
        pixels[~finite] = pixels[finite].min() if finite.any() else 0
    low, high = float(pixels.min()), float(pixels.max())
    if low == high:
        return np.zeros(pixels.shape, np.float32)
    return ((pixels - low) / (high - low)).astype(np.float32)
