"""Synthetic patients for the tests."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for variable in ("TRAINML_DATA_PATH", "TRAINML_MODEL_PATH", "TRAINML_OUTPUT_PATH"):
    os.environ.pop(variable, None)


def make_dicom(pixels, *, transfer_syntax=ExplicitVRLittleEndian, **tags):
    """An uncompressed DICOM data set of `pixels` (height, width[, 3]) with the challenge's header and `tags`."""
    pixels = np.ascontiguousarray(pixels)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition = "CR", "F", "062Y", "PA"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(dataset, key, value)
    return dataset


@pytest.fixture
def write_dicom():
    """write_dicom(path, pixels, **tags) writes make_dicom's data set and returns the path."""
    def write(path, pixels, **tags):
        make_dicom(pixels, **tags).save_as(path, enforce_file_format=True)
        return path
    return write


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Folder with a small synthetic data set of sample_data.py: 40 training and 4 test images."""
    import sample_data
    folder = tmp_path_factory.mktemp("phantoms")
    sample_data.main(["--train", "40", "--test", "4", "--output", str(folder)])
    return folder


@pytest.fixture(scope="session")
def train_csv(phantoms, tmp_path_factory):
    """train.csv of the phantoms."""
    import data_processing
    folder = tmp_path_factory.mktemp("tables")
    data_processing.build_training_csv(phantoms / "stage_2_train_images", phantoms, folder)
    return folder / "train.csv"
