"""Synthetic patients, checkpoints and flags that several test files use."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--rescale-factor", "16", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]
for variable in ("TRAINML_DATA_PATH", "TRAINML_MODEL_PATH", "TRAINML_OUTPUT_PATH"):
    os.environ.pop(variable, None)


def make_dicom(pixels, *, transfer_syntax=ExplicitVRLittleEndian, **tags):
    """An uncompressed DICOM data set of `pixels` (height, width[, 3]) with the challenge's header
    and `tags`."""
    pixels = np.ascontiguousarray(pixels)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.ViewPosition = "CR", "PA"
    dataset.PatientSex, dataset.PatientAge = "F", "062Y"
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


@pytest.fixture
def train_flags(phantoms, train_csv, tmp_path):
    """Flags for a run on 20 images, the fewest that train.py takes, saving to tmp_path/output."""
    rows = pd.read_csv(train_csv).drop_duplicates("patientId").groupby("Target").head(10)
    rows.to_csv(tmp_path / "train.csv", index=False)
    return ["--data", phantoms / "stage_2_train_images", "--labels", tmp_path / "train.csv",
            "--save", tmp_path / "output", *SMALL, "--no-save-images"]


@pytest.fixture
def labelled(phantoms, train_csv, tmp_path):
    """Arguments, data set and parts of train.py on the phantoms."""
    import train
    args = train.parse_args(["--data", str(phantoms / "stage_2_train_images"),
                             "--labels", str(train_csv), "--save", str(tmp_path), *SMALL])
    return args, *train.build_data(args)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained network on few patches, which sees opacities in many places."""
    from model import PneumoniaUNET, save_checkpoint
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "final.pth.tar"
    save_checkpoint(path, PneumoniaUNET(patch_size=2), best_threshold=0.04, gate_threshold=0.0,
                    rescale_factor=16)
    return path


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """The endpoint's server, in a process of its own."""
    from test_endpoint import Server
    server = Server(checkpoint, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def assert_same_weights(first, second):
    """Two checkpoint files hold exactly the same network."""
    from model import load_checkpoint
    weights = [load_checkpoint(path)[0].state_dict() for path in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name


def pytest_collection_modifyitems(items):
    """Leaves out what is marked as needing Linux on other systems."""
    if sys.platform != "linux":
        for item in items:
            if item.get_closest_marker("linux"):
                item.add_marker(pytest.mark.skip(reason="needs Linux"))
