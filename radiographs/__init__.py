"""Reads chest radiographs from DICOM, PNG, JPEG and TIFF files, any of which may be damaged.

    paths -> files.py: which of them hold radiographs, and their ids
          -> readers.py: separate processes, so that a hostile file costs only itself
          -> dicom.py and pictures.py: the first frame is decoded, or the file refused
          -> greyscale.py: its stored values become grey levels, 0..1 with air dark
          -> a Radiograph: a square image for a network, and one at the original's aspect for people

A file that cannot be read raises UnreadableImage with the reason, in a process gives a Reading with
a problem; what was ignored or is in doubt is an ImageWarning, there the Reading's note. The package
needs NumPy, Pillow, simplejpeg, pydicom and, for compressed files, python-gdcm, and no more.
"""

from .dicom import Radiograph, load_and_prepare_image, read_header, read_radiograph
from .errors import ImageWarning, UnreadableImage, decoding_errors
from .files import find_dicom_files, find_radiographs, patient_id_of
from .readers import ReaderPool, Reading, read_images, readings_of
