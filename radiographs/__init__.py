"""Reads chest radiographs from DICOM, PNG, JPEG and TIFF files, any of which may be damaged.

    paths -> files.py: which of them hold radiographs, and their ids
          -> readers.py: separate processes, so that a hostile file costs only itself
          -> dicom.py: the header is checked and the first frame decoded, or the file is refused
          -> greyscale.py: its stored values become grey levels, 0..1 with air dark
          -> a Radiograph: a square image for a network, and one at the original's aspect for people

A file that cannot be read raises UnreadableImage with the reason, in a process gives a Reading with
a problem; what was ignored or is in doubt is an ImageWarning, there the Reading's note. The package
needs NumPy, Pillow, pydicom and, for compressed files, python-gdcm; it imports nothing else.
"""

from .dicom import (
    Radiograph,
    UnreadableImage,
    load_and_prepare_image,
    read_header,
    read_radiograph,
)
from .files import find_dicom_files, find_radiographs, patient_id_of
from .greyscale import ImageWarning
from .readers import ReaderPool, Reading, read_images, readings_of
