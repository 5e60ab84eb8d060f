"""What can be wrong with a file: UnreadableImage refuses it, an ImageWarning remarks on it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError
from pydicom import config
from pydicom.errors import InvalidDicomError

# in a frame, about twice the largest radiographs; more is refused before it is allocated
MAX_PIXELS = 2**25
NOT_DICOM = "is not a DICOM file"
DAMAGED = "is damaged or of an unknown kind"
REASONS = {  # by the type of an error
    InvalidDicomError: NOT_DICOM,
    Image.DecompressionBombError: f"declares more than the {MAX_PIXELS:,} pixels that can be read",
    UnidentifiedImageError: DAMAGED,
    MemoryError: "takes too much memory to read",
    RecursionError: "nests its sequences too deeply",
}
ABOUT_THE_FILE = (  # first words of libraries' messages that make sense to users
    "A (00", "Missing required element: (", "No tag to read at file position", "Unknown (00",
    "The number of bytes of pixel data", "Unable to decode the pixel data", "broken data stream",
    "image file is truncated", "Truncated File Read")


class UnreadableImage(ValueError):
    """A file that holds no radiograph we can decode; the message is the reason."""


class ImageWarning(UserWarning):
    """A radiograph that was read, but not as a plain grey image of a chest."""


def add_note(text: str) -> None:
    """Warns with ImageWarning; `text` completes a sentence that starts with the file's name."""
    warnings.warn(text, ImageWarning, stacklevel=2)


def check_size(columns: int, rows: int, frames: int) -> None:
    """Refuses what is too large to be decoded, or empty, and remarks on more than one frame."""
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableImage(
            f"declares {columns} x {rows} pixels; 1 to {MAX_PIXELS:,} can be read")
    if frames > 1:
        add_note(f"has {frames} frames; only the first is used")


def reason_of(error: Exception) -> str:
    """One plain line on why a file cannot be read, for any error of pydicom or a decoder."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return reason
    text = " ".join(str(error).split())
    if text.startswith("Unable to decode as exceptions were raised by all"):
        return ("holds pixels that no decoder can read: they are damaged, or not what the header "
                "says")
    if text.startswith(ABOUT_THE_FILE):
        return f"{DAMAGED} ({text:.150})"
    return "has a header that is damaged or lacks a needed value"


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Turns whatever pydicom and its decoders raise inside the block into UnreadableImage."""
    try:
        with config.disable_value_validation():
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # they raise many types
        raise UnreadableImage(reason_of(error)) from error
