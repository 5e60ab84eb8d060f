"""Reads chest radiographs: DICOM, PNG, JPEG and TIFF files, any of which may be damaged.

files.py finds the files of a folder, readers.py hands them to separate processes, dicom.py decodes
each there, and greyscale.py turns its stored values into grey levels.
"""

from .dicom import (
    TAGS,
    Radiograph,
    UnreadableImage,
    decoding_errors,
    load_and_prepare_image,
    read_header,
    read_radiograph,
)
from .files import (
    MARKER,
    TEST_IMAGES,
    TRAIN_IMAGES,
    find_dicom_files,
    find_radiographs,
    patient_id_of,
    refuse_mixture,
    result_paths,
)
from .readers import INTERNAL_ERROR, ReaderPool, Reading, read_files, read_image, read_images
