"""Hostile files, interrupted runs and full disks, met as a user meets them: mostly through the
command line."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from itertools import cycle, islice
from pathlib import Path

import gdcm
import numpy as np
import pandas as pd
import pydicom.data
import pytest
from conftest import ROOT, make_dicom
from PIL import Image, ImageCms
from pydicom import dcmread, uid
from pydicom.dataelem import RawDataElement
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from model import load_checkpoint
from radiographs.dicom import load_and_prepare_image
from radiographs.files import patient_id_of
from radiographs.readers import MEMORY_LIMIT

pytestmark = pytest.mark.linux
PYDICOM = Path(pydicom.data.__file__).parent
SAMPLES = PYDICOM / "test_files"
STOP_SECONDS = 30  # 7 at a load of 10, most of it for the exit of the interpreter


def command(*words):
    return [sys.executable, *map(str, words)]


def run(script, *flags, **options):
    """Runs a script of the project to its end in a process of its own, output captured as text."""
    return subprocess.run(command(ROOT / script, *flags), capture_output=True, text=True,
                          timeout=300, **options)


def start(script, *flags):
    """Starts a script of the project as the head of a process group, output as pipes of text."""
    return subprocess.Popen(command(ROOT / script, *flags), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def only_line(text):
    assert len(text.splitlines()) == 1, text
    return text


# Files


MEASURED = """
import importlib, resource, sys
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF):
    print(resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def run_measured(module, *flags):
    """Runs a module's main; returns the bytes that its largest reader takes beyond its own, which
    a reader shares, and the seconds."""
    started = time.monotonic()
    done = subprocess.run(command("-c", MEASURED, module, *flags), cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, timeout=1200)
    assert done.returncode == 0
    readers, own = map(int, done.stdout.splitlines()[-2:])
    return readers - own, time.monotonic() - started


def predict_measured(folder, checkpoint, output):
    """predict.py on `folder`: annotations, reasons {path: reason}, bytes and seconds; each file is
    in one of the two."""
    memory, seconds = run_measured("predict", "--data", folder, "--model", checkpoint, "--output",
                                   output, "--workers", 2, "--no-save-images")
    annotations = json.loads((output / "annotations.json").read_text("utf-8"))
    with open(output / "skipped.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    reasons = {Path(path): reason for path, reason in rows}
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "DICOMDIR"}
    assert len(reasons) == len(rows) and reasons.keys() <= files and all(reasons.values())
    assert len(annotations) == len(files - reasons.keys())
    names = set(map(patient_id_of, files - reasons.keys()))
    assert {Path(key).name for key in annotations} == names
    return annotations, reasons, memory, seconds


def test_every_file_that_ships_with_pydicom_is_predicted_or_skipped(tmp_path, checkpoint):
    annotations, reasons, *_ = predict_measured(PYDICOM, checkpoint, tmp_path)
    print(f"{len(annotations)} predicted, {len(reasons)} skipped")
    assert len(annotations) > 40
    for reason in reasons.values():
        assert "Error" not in reason and "\n" not in reason
        assert "object has no attribute" not in reason


def as_radiograph(path, name):
    """Writes a sample of pydicom to `path` under the Modality of a radiograph; returns `path`."""
    dataset = dcmread(SAMPLES / name)
    dataset.Modality = "CR"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("name, syntax", [
    ("MR_small", uid.ExplicitVRLittleEndian), ("MR_small_implicit", uid.ImplicitVRLittleEndian),
    ("MR_small_bigendian", uid.ExplicitVRBigEndian), ("MR_small_RLE", uid.RLELossless),
    ("MR_small_jpeg_ls_lossless", uid.JPEGLSLossless),
    ("MR_small_jp2klossless", uid.JPEG2000Lossless),
    ("image_dfl", uid.DeflatedExplicitVRLittleEndian), ("SC_rgb_jpeg_gdcm", uid.JPEGLosslessSV1),
    ("JPEGLSNearLossless_16", uid.JPEGLSNearLossless), ("693_J2KI", uid.JPEG2000),
])
def test_every_transfer_syntax_is_read(tmp_path, name, syntax, recwarn):
    path = as_radiograph(tmp_path / "a.dcm", f"{name}.dcm")
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    image, _ = load_and_prepare_image(path, 64)
    assert image.min() == 0 and image.max() == 1 and image.std() > 0.05
    if name.startswith("MR_small"):
        plain = as_radiograph(tmp_path / "b.dcm", "MR_small.dcm")
        np.testing.assert_array_equal(image, load_and_prepare_image(plain, 64)[0])


@pytest.mark.parametrize("process", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_a_lossless_jpeg_of_16_bits_is_read(tmp_path, process):
    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    change = gdcm.ImageChangeTransferSyntax()
    plain = as_radiograph(tmp_path / "plain.dcm", "MR_small.dcm")
    reader.SetFileName(str(plain))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, process)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "a.dcm"))
    assert writer.Write()
    syntax = dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID
    assert syntax in uid.JPEGTransferSyntaxes
    expected, _ = load_and_prepare_image(plain, 64)
    np.testing.assert_array_equal(load_and_prepare_image(tmp_path / "a.dcm", 64)[0], expected)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_jpeg_extended_of_12_bits_is_read_as_gdcm_reads_it(tmp_path, name):
    reader = gdcm.ImageReader()
    reader.SetFileName(str(SAMPLES / name))
    assert reader.Read()
    cells = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    pixels = np.frombuffer(cells, "<u2").reshape(1024, 256)
    make_dicom(pixels).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    expected, _ = load_and_prepare_image(tmp_path / "a.dcm")
    path = as_radiograph(tmp_path / "b.dcm", name)
    np.testing.assert_array_equal(load_and_prepare_image(path)[0], expected)


@pytest.mark.parametrize("name", ["12 bits.dcm", os.fsdecode(b"12 bits \xf6.dcm")])
def test_jpeg_of_12_bits_is_read_under_the_name_of_8_whatever_its_file_is_called(tmp_path, name):
    plain = as_radiograph(tmp_path / "plain.dcm", "JPGExtended.dcm")
    dataset = dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    dataset.save_as(tmp_path / name)
    expected, _ = load_and_prepare_image(plain)
    np.testing.assert_array_equal(load_and_prepare_image(tmp_path / name)[0], expected)


# Mutated files


SEEDS = [
    "MR_small", "MR_small_implicit", "MR_small_bigendian", "image_dfl", "MR_small_RLE", "JPEG2000",
    "rtdose_1frame", "MR_small_jpeg_ls_lossless", "JPEGLSNearLossless_16", "MR_small_jp2klossless",
    "SC_rgb_small_odd_jpeg", "SC_rgb_jpeg_dcmtk", "SC_rgb_jpeg_gdcm", "SC_rgb_rle_2frame",
    "liver_expb_1frame"]
MUTATIONS = ["bits", "cut", "tags", "nested", "lengths", "values", "stream"]
PICTURES = [  # suffix, mode and options of Pillow
    ("png", "L", {}), ("png", "I;16", {}), ("png", "RGBA", {}), ("png", "P", {}),
    ("jpg", "L", {"quality": 95}), ("jpg", "RGB", {"progressive": True}), ("jpg", "CMYK", {}),
    ("tif", "L", {}), ("tif", "I;16", {"compression": "tiff_lzw"}), ("tif", "F", {}),
    ("tif", "RGB", {"compression": "tiff_adobe_deflate"}), ("tif", "1", {"compression": "group4"})]
SIZES = {  # marker: code, places
    b"\xff\xc0": (">H", 5, 7), b"\xff\xc3": (">H", 5, 7), b"\xff\xf7": (">H", 5, 7),
    b"\xff\x51": (">I", 6, 10, 22, 26)}
LENGTHS = [0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]
VALUES = [0, 1, 3, 8, 12, 16, 32, 64, 255, 4096, 32768, 65535]


class Seed:
    """A DICOM file with the places of its data elements, unless it is deflated."""

    def __init__(self, path):
        self.data, header = path.read_bytes(), dcmread(path)
        self.implicit, little = header.original_encoding
        self.order = "<" if little else ">"
        deflated = header.file_meta.TransferSyntaxUID.is_deflated
        raw = [header.get_item(tag) for tag in header.keys() if not deflated]
        raw = [element for element in raw if isinstance(element, RawDataElement)]
        self.heads = [element.value_tell - self.head_length(element) for element in raw]
        self.values = [element.value_tell for element in raw
                       if element.tag.group == 0x28 and element.length == 2]

    def head_length(self, element):
        return 12 if not self.implicit and element.VR in EXPLICIT_VR_LENGTH_32 else 8

    def pack(self, code, *values):
        return struct.pack(self.order + code, *values)

    def mutate(self, kind, rng):
        data = bytearray(self.data)
        if kind == "cut":
            del data[rng.randrange(len(data)):]
        elif kind == "bits" or not self.heads:
            end = rng.choice([len(data), min(len(data), 2000)])
            for _ in range(rng.choice([1, 4, 32])):
                data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        elif kind == "tags":
            a, b = rng.sample(self.heads, 2)
            data[a:a + 4], data[b:b + 4] = data[b:b + 4], data[a:a + 4]
        elif kind == "lengths":
            at = rng.choice(self.heads) + rng.choice([4, 6, 8])
            length = rng.choice([*LENGTHS, len(data), rng.getrandbits(32)])
            data[at:at + 4] = self.pack("I", length)
        elif kind == "nested":
            at = rng.choice(self.heads)
            item = self.pack("IHHI", 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
            kind_of_value = b"" if self.implicit else b"SQ\0\0"
            sequence = self.pack("HH", 0x0008, 0x1140) + kind_of_value + item
            data[at:at] = sequence * rng.choice([1, 30, 1000, 30000])
        elif kind == "values":  # rows, columns, samples, bits
            for at in rng.sample(self.values, rng.choice([1, 2])):
                data[at:at + 2] = self.pack("H", rng.choice(VALUES))
        elif kind == "stream":  # the size that the compressed stream declares
            side = rng.choice([1, 300, 5000, 40000, 65535])
            for marker, (code, *places) in SIZES.items():
                at = data.find(marker, self.values[-1], -30)
                for place in places if at > 0 else ():
                    struct.pack_into(code, data, at + place, side)
        return data


def deflate_bomb(path):
    """A file of 3 MB whose data set inflates to 3 GB."""
    header = make_dicom(np.zeros((8, 8), np.uint8),
                        transfer_syntax=uid.DeflatedExplicitVRLittleEndian)
    del header.PixelData
    header.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    # the data set begins behind the file meta information
    start = 144 + struct.unpack("<I", content[140:144])[0]
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)

    def deflate(data):
        return compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)
    pixel_data = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 3 * 2**30)
    head = deflate(zlib.decompress(content[start:], -15) + pixel_data)
    body = head + deflate(bytes(2**24)) * 192
    path.write_bytes(content[:start] + body + compressor.flush())


def picture(suffix, mode, options):
    """The bytes of a PNG, JPEG or TIFF image with metadata and an orientation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[274], exif[270] = 6, "phantom"
    pixels = (np.add.outer(np.arange(60), 3 * np.arange(80)) % 256).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(file, {"jpg": "JPEG", "tif": "TIFF", "png": "PNG"}[suffix], exif=exif, **options,
               icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    return file.getvalue()


def mutate_picture(data, rng):
    """The bytes of an image with a few bits, or a length, or a part changed."""
    data, start = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(["bits", "head", "cut", "length", "lost", "doubled"])
    if kind == "cut":
        del data[start:]
    elif kind == "length":
        data[start:start + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(LENGTHS))
    elif kind == "lost":
        del data[start:start + rng.choice([1, 4, 100])]
    elif kind == "doubled":
        data[start:start] = data[start:start + rng.choice([12, 100])]
    else:
        end = len(data) if kind == "bits" else min(len(data), 300)
        for _ in range(rng.choice([1, 4, 32])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return data


@pytest.fixture
def mutated(tmp_path, count):
    """Folder of mutated DICOM files and a deflate bomb, and in a third of the `count` images."""
    folder, rng = tmp_path / "mutated", random.Random(5)
    folder.mkdir()
    seeds = [Seed(as_radiograph(tmp_path / "seed.dcm", f"{name}.dcm")) for name in SEEDS]
    pictures = [(suffix, picture(suffix, mode, options)) for suffix, mode, options in PICTURES]
    for number, kind in enumerate(islice(cycle(MUTATIONS), count)):
        path, data = folder / f"{number:04} {kind}.dcm", rng.choice(seeds).mutate(kind, rng)
        if number % 3 == 0:  # under the name of a DICOM file, so that it is read beside them
            suffix, data = rng.choice(pictures)
            path, data = folder / f"{number:04} {suffix}.dcm", mutate_picture(data, rng)
        path.write_bytes(data)
    deflate_bomb(folder / "bomb.dcm")
    return folder


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.soak)])
def test_mutated_files_are_predicted_or_skipped(mutated, count, checkpoint, tmp_path):
    annotations, reasons, memory, seconds = predict_measured(
        mutated, checkpoint, tmp_path / "output")
    crashed = sum("crashed" in reason for reason in reasons.values())
    slow = sum("took more than" in reason for reason in reasons.values())
    refused = len(reasons) - crashed - slow
    print(f"{count + 1} files: {len(annotations)} decoded, {refused} refused, {crashed} crashed "
          f"their decoder, {slow} took too long; largest reader {memory / 1e6:.0f} MB more, "
          f"{seconds:.0f} s")
    assert len(annotations) > count / 10 and len(reasons) > count / 10
    assert not [reason for reason in reasons.values() if "internal error" in reason]
    assert memory < MEMORY_LIMIT  # beyond the script's own, with PyTorch


# Mistakes


@pytest.mark.parametrize("script, flags, words", [
    ("data_processing.py", [],
     ["nowhere/stage_2_train_images", "--images", "TRAINML_DATA_PATH"]),
    ("data_processing.py", ["--images", ".", "--labels", "no"],
     ["no does not exist", "--labels", "DATA"]),
    ("data_processing.py", ["--images", ".", "--labels", ".", "--output", ROOT / "cli.py" / "x"],
     ["cli.py/x", "--output", "MODEL"]),
    ("train.py", [], ["nowhere/stage_2_train_images", "--data", "TRAINML_DATA_PATH"]),
    ("predict.py", ["--data", ".", "--model", "no.tar"],
     ["no.tar", "--model", "TRAINML_MODEL_PATH"]),
])
def test_missing_paths_are_one_line_and_status_2(tmp_path, script, flags, words):
    done = run(script, *flags, cwd=tmp_path, env={**os.environ, "TRAINML_DATA_PATH": "nowhere"})
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert all(word in only_line(done.stderr) for word in [f"{script}: error: ", *words])


def test_nothing_to_predict_is_status_1(tmp_path, checkpoint):
    (tmp_path / "a.dcm").write_text("no DICOM")
    done = run("predict.py", "--data", tmp_path, "--model", checkpoint,
               "--output", tmp_path / "output")
    assert done.returncode == 1 and not done.stderr
    assert "images predicted: 0" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("batch_size, message", [
    (8, r"the loss is nan at step \d of epoch 1, learning rate \S+e\+\d\d"),
    (16, "the validation loss is nan"),  # after the only step of the epoch
])
def test_a_loss_that_is_not_finite_is_one_line(train_flags, tmp_path, batch_size, message):
    done = run("train.py", *train_flags, "--batch-size", batch_size, "--epochs", 1,
               "--optimizer", "sgd", "--learning-rate", "1e30")
    assert done.returncode > 0 and re.search(message, only_line(done.stderr))
    assert not list((tmp_path / "output").glob("*.tar"))


# Signals


def living(pids):
    """Those of `pids` that have not ended."""
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            return "X"
    return [pid for pid in pids if state(pid) not in "XZ"]


def processes_of(group):
    """Ids of the processes in a process group."""
    def group_of(pid):
        try:
            return os.getpgid(pid)
        except OSError:
            return None
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [pid for pid in pids if group_of(pid) == group]


def stop(process, signum):
    """Sends a signal, Ctrl-C to the whole group as a terminal does: output, errors, seconds, and
    what still lives."""
    group, started = processes_of(process.pid), time.monotonic()
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    while living(group) and time.monotonic() - started < 2 * STOP_SECONDS:
        time.sleep(0.1)
    return output, errors, seconds, living(group)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_training_logs_every_epoch_at_once_and_stops_within_seconds(train_flags, tmp_path, signum):
    process, lines = start("train.py", *train_flags, "--epochs", 1000), []
    while not any(line.startswith("epoch 2/") for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    assert process.poll() is None, "the lines came only when the run had ended"
    output, errors, seconds, left = stop(process, signum)
    lines += output.splitlines()
    last = tmp_path / "output" / "last.pth.tar"
    _, state = load_checkpoint(last)
    assert len(state["history"]) >= len([line for line in lines if line.startswith("epoch ")]) >= 2
    print(f"ended {seconds:.1f} s after signal {signum}")
    assert process.returncode == 128 + signum and errors == "train.py: stopped\n"
    assert seconds < STOP_SECONDS
    assert f"--checkpoint {last}" in lines[-1] and not left
    assert not list(last.parent.glob(".*.part"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_prediction_stops_with_its_readers(phantoms, checkpoint, tmp_path, signum):
    images = list((phantoms / "stage_2_train_images").iterdir())
    (tmp_path / "data").mkdir()
    for number in range(1000):
        (tmp_path / "data" / f"{number}.dcm").symlink_to(images[number % len(images)])
    output = tmp_path / "output"
    process = start("predict.py", "--data", tmp_path / "data", "--model", checkpoint,
                    "--output", output, "--workers", 3)
    assert process.stdout.readline().startswith(f"files in {tmp_path / 'data'}: 1000;")
    while not list(output.glob("images/*.png")):
        time.sleep(0.1)
    assert len(processes_of(process.pid)) == 4
    _, errors, seconds, left = stop(process, signum)
    print(f"ended {seconds:.1f} s after signal {signum}")
    assert seconds < STOP_SECONDS and not left
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum)
    assert "Traceback" not in errors
    assert signum == signal.SIGKILL or not list(output.rglob("*.part"))
    assert list(output.glob(".unfinished-*"))  # the next run goes on


def test_results_are_written_though_nobody_reads_the_output(phantoms, checkpoint, tmp_path):
    process = start("predict.py", "--data", phantoms / "stage_2_test_images", "--model", checkpoint,
                    "--output", tmp_path)
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == "" and process.wait(STOP_SECONDS) == 0
    assert len(json.loads((tmp_path / "annotations.json").read_text("utf-8"))) == 4


HUNG = """
import os
from radiographs import readers
def hang(path):
    os.write(1, b"hung\\n")  # whole, whoever else writes
    while True:
        pass
readers.TIME_LIMIT = 2
with readers.readings_of(hang, ["a", "b"], workers=2) as readings:
    list(readings)
"""


def test_readers_that_hang_do_not_outlive_a_killed_parent():
    process = subprocess.Popen(command("-c", HUNG), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert [process.stdout.readline() for _ in range(2)] == ["hung\n"] * 2
    *_, left = stop(process, signal.SIGKILL)
    assert not left


# Disks


@pytest.mark.parametrize("script, limit, status, old", [
    ("data_processing.py", 3_000, 2, ["train.csv"]),
    ("train.py", 50_000, 2, ["last.pth.tar"]),  # no room for the prepared images
    # a checkpoint fails
    ("train.py", 10_000_000, 1, ["last.pth.tar", "prec.best.pth.tar", "loss.best.pth.tar"]),
    ("predict.py", 20_000, 1, ["annotations.json", "submission.csv"]),  # a picture fails
])
def test_files_that_cannot_grow_leave_the_old_ones(
        phantoms, train_flags, checkpoint, tmp_path, script, limit, status, old):
    output = tmp_path / "output"
    output.mkdir()
    for name in old:
        (output / name).write_text("old")
    images = phantoms / "stage_2_train_images"
    flags = {"data_processing.py": ["--images", images, "--labels", phantoms, "--output", output],
             "train.py": [*train_flags, "--epochs", 1],
             "predict.py": ["--data", images, "--model", checkpoint, "--output", output]}[script]

    def limit_files():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = run(script, *flags, preexec_fn=limit_files)
    assert done.returncode == status and "File too large" in only_line(done.stderr)
    assert all((output / name).read_text() == "old" for name in old)
    assert not list(output.rglob("*.part"))


PRIVATE = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]  # what is mounted stays there


def skip_without_mounts(folder):
    mount = [*PRIVATE, f"mount -t tmpfs tmpfs '{folder}'"]
    if not shutil.which("unshare") or subprocess.run(mount).returncode:
        pytest.skip("has no right to mount a tmpfs")


def run_on_tmpfs(options, folder, script, *flags):
    """Runs a script with a tmpfs of its own on `folder`, which holds `old` in annotations.json.

    After it, the output ends in that file's content and the names of all files.
    """
    skip_without_mounts(folder)
    shell = f"""
        cd '{folder.parent}'; mount -t tmpfs tmpfs {folder.name}
        printf old > {folder.name}/annotations.json
        mount -o remount,{options} {folder.name}
        "$@" || status=$?
        echo; cat {folder.name}/annotations.json; echo; find {folder.name} -type f
        exit $status"""
    return subprocess.run([*PRIVATE, shell, "sh", *command(ROOT / script, *flags)],
                          capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("options, script, status, message", [
    ("size=300k", "predict.py", 1, "No space left on device"),
    ("size=20m", "train.py", 2, "output has 21 MB left, but a run needs"),
    ("ro", "predict.py", 2,
     "cannot write to .*output.*Read-only file system.*--output.*TRAINML_OUTPUT_PATH"),
])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_the_old_files(
        phantoms, train_flags, checkpoint, tmp_path, options, script, status, message):
    output = tmp_path / "output"
    output.mkdir()
    images = phantoms / "stage_2_train_images"
    flags = {"train.py": train_flags,
             "predict.py": ["--data", images, "--model", checkpoint, "--output", output]}[script]
    done = run_on_tmpfs(options, output, script, *flags)
    assert done.returncode == status and re.search(message, only_line(done.stderr))
    lines = done.stdout.splitlines()
    content, *names = lines[lines.index("old"):]
    assert content == "old" and "output/annotations.json" in names
    assert not any(name.endswith(".part") for name in names)


CONTAINER = """
mount -t tmpfs -o ro tmpfs /dev/shm
for folder in /tmp /var/tmp {root}; do
    mount --rbind $folder $folder; mount -o remount,bind,ro $folder
done
mount -t tmpfs tmpfs {output}; cd {root}
"$@"
"""


def run_in_container(output, script, *flags):
    """Runs a script where only `output` can be written to: no temporary folder, no semaphores."""
    skip_without_mounts(output)
    shell = CONTAINER.format(root=ROOT, output=output)
    return subprocess.run([*PRIVATE, shell, "sh", *command(ROOT / script, *flags)],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TMPDIR": ""})


@pytest.mark.parametrize("script", ["data_processing.py", "predict.py"])
def test_files_are_read_in_a_read_only_container(phantoms, checkpoint, tmp_path, script):
    images = phantoms / "stage_2_test_images"
    flags, count = {
        "data_processing.py": (["--type", "prediction", "--images", images], "4 images"),
        "predict.py": (["--data", images, "--model", checkpoint], "images predicted: 4")}[script]
    done = run_in_container(tmp_path, script, *flags, "--output", tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert count in done.stdout.splitlines()[-1]


def test_training_without_a_temporary_folder_says_what_to_set(train_flags, tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    done = run_in_container(save, "train.py", *train_flags, "--save", save)
    assert done.returncode == 2 and "set TMPDIR" in only_line(done.stderr)


WRITER = """
import itertools, sys
from cli import atomic_write
print("ready", flush=True)
for number in itertools.count():
    with atomic_write(sys.argv[1]) as file:
        for _ in range(64):
            file.write(bytes([number % 256]) * 2**16)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path, size, rng, caught = tmp_path / "file", 64 * 2**16, random.Random(6), 0
    path.write_bytes(bytes(size))
    for _ in range(20):
        process = subprocess.Popen(command("-c", WRITER, path), cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        content = path.read_bytes()
        assert content == content[:1] * size
        caught += len(list(tmp_path.glob(".*"))) > caught
    print(f"20 kills, {caught} of them in the middle of a file")
    assert caught


# Names that the locale cannot spell


@pytest.fixture(params=[
    {"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def foreign_locale(request):
    """Environment whose locale cannot spell NAMES."""
    return {**os.environ, **request.param}


NAMES = ("plain.dcm", "Ünïcode.dcm", os.fsdecode(b"f\xf6hn.dcm"))
IDS = ["plain", r"f\xf6hn", "Ünïcode"]


@pytest.fixture
def named(phantoms, tmp_path):
    """Folder of images with the names NAMES."""
    image = next((phantoms / "stage_2_test_images").iterdir())
    (tmp_path / "data").mkdir()
    for name in NAMES:
        shutil.copy(image, tmp_path / "data" / name)
    return tmp_path / "data"


def test_a_table_holds_names_that_the_locale_cannot_spell(named, tmp_path, foreign_locale):
    done = run("data_processing.py", "--type", "prediction", "--images", named,
               "--output", tmp_path, env=foreign_locale)
    assert done.returncode == 0 and not done.stderr
    assert sorted(pd.read_csv(tmp_path / "predict.csv")["patientId"]) == sorted(IDS)


def test_files_with_names_that_the_locale_cannot_spell_are_predicted(
        named, checkpoint, tmp_path, foreign_locale):
    output = tmp_path / "output"
    done = run("predict.py", "--data", named, "--model", checkpoint, "--output", output,
               env=foreign_locale)
    assert done.returncode == 0 and not done.stderr
    assert json.loads((output / "annotations.json").read_text("utf-8")).keys() == set(IDS)
    assert sorted(path.stem for path in (output / "images").iterdir()) == sorted(IDS)
