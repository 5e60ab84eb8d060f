"""Hostile files, interrupted runs and full disks, met as a user meets them: mostly through the command line."""

import csv
import json
import os
import random
import re
import resource
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
import torch
from pydicom import dcmread, uid
from pydicom.dataelem import RawDataElement
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

import dicom
from conftest import ROOT, make_dicom
from dicom import patient_id_of
from model import PneumoniaUNET, load_checkpoint, save_checkpoint

PYDICOM = Path(pydicom.data.__file__).parent
SAMPLES = PYDICOM / "test_files"
SMALL = ["--rescale-factor", 16, "--batch-size", 8, "--precision", "fp32", "--no-save-images"]
STOP_SECONDS = 10  # 5 and a training step in progress, on a slow machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained network that sees opacities in many places."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "final.pth.tar"
    save_checkpoint(path, PneumoniaUNET(), best_threshold=0.04, gate_threshold=0.0, rescale_factor=16)
    return path


@pytest.fixture
def train_flags(phantoms, train_csv, tmp_path):
    """Flags for a run on 20 images, the fewest that train.py takes, saving to tmp_path/output."""
    rows = pd.read_csv(train_csv).drop_duplicates("patientId").groupby("Target").head(10)
    rows.to_csv(tmp_path / "train.csv", index=False)
    images = phantoms / "stage_2_train_images"
    return ["--data", images, "--labels", tmp_path / "train.csv", "--save", tmp_path / "output", *SMALL]


def command(*words):
    return [sys.executable, *map(str, words)]


def run(script, *flags, **options):
    """Runs a script of the project to its end in a process of its own, output captured as text."""
    return subprocess.run(command(ROOT / script, *flags), capture_output=True, text=True, timeout=300, **options)


def start(script, *flags):
    """Starts a script of the project as the head of a process group, output as pipes of text."""
    return subprocess.Popen(command(ROOT / script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def only_line(text):
    assert len(text.splitlines()) == 1, text
    return text


# Files

MEASURED = """
import importlib, json, resource, sys
import numpy, predict
predict.predict_masks = lambda model, images, runtime: numpy.ones((len(images), 64, 64))
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(memory * (1 if sys.platform == "darwin" else 1024))
"""


def run_measured(module, *flags):
    """Runs a module's main without its network; returns the bytes of the largest reader process."""
    done = subprocess.run(command("-c", MEASURED, module, *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          timeout=300)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


def predict_measured(folder, checkpoint, output):
    """predict.py on `folder`: annotations, reasons {path: reason} and bytes; each file is in one of the two."""
    memory = run_measured("predict", "--data", folder, "--model", checkpoint, "--output", output,
                          "--workers", 2, "--no-save-images")
    annotations = json.loads((output / "annotations.json").read_text("utf-8"))
    with open(output / "skipped.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    reasons = {Path(path): reason for path, reason in rows}
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "DICOMDIR"}
    assert len(reasons) == len(rows) and reasons.keys() <= files and all(reasons.values())
    assert len(annotations) == len(files - reasons.keys())
    assert {Path(key).name for key in annotations} == set(map(patient_id_of, files - reasons.keys()))
    return annotations, reasons, memory


def test_every_file_that_ships_with_pydicom_is_predicted_or_skipped(tmp_path, checkpoint):
    annotations, reasons, _ = predict_measured(PYDICOM, checkpoint, tmp_path)
    print(f"{len(annotations)} predicted, {len(reasons)} skipped")
    assert len(annotations) > 50
    for reason in reasons.values():
        assert "Error" not in reason and "object has no attribute" not in reason and "\n" not in reason


@pytest.mark.parametrize("name, syntax", [
    ("MR_small", uid.ExplicitVRLittleEndian), ("MR_small_implicit", uid.ImplicitVRLittleEndian),
    ("MR_small_bigendian", uid.ExplicitVRBigEndian), ("MR_small_RLE", uid.RLELossless),
    ("MR_small_jpeg_ls_lossless", uid.JPEGLSLossless), ("MR_small_jp2klossless", uid.JPEG2000Lossless),
    ("image_dfl", uid.DeflatedExplicitVRLittleEndian), ("SC_rgb_jpeg_gdcm", uid.JPEGLosslessSV1),
    ("JPEGLSNearLossless_16", uid.JPEGLSNearLossless), ("693_J2KI", uid.JPEG2000),
])
def test_transfer_syntaxes(name, syntax, recwarn):
    path = SAMPLES / f"{name}.dcm"
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    image, _ = dicom.load_and_prepare_image(path, 16)
    assert image.min() == 0 and image.max() == 1 and image.std() > 0.05
    if name.startswith("MR_small"):
        np.testing.assert_array_equal(image, dicom.load_and_prepare_image(SAMPLES / "MR_small.dcm", 16)[0])


@pytest.mark.parametrize("process", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_jpeg_lossless_of_16_bits(tmp_path, process):
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(SAMPLES / "MR_small.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, process)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "a.dcm"))
    assert writer.Write() and dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID in uid.JPEGTransferSyntaxes
    expected, _ = dicom.load_and_prepare_image(SAMPLES / "MR_small.dcm", 16)
    np.testing.assert_array_equal(dicom.load_and_prepare_image(tmp_path / "a.dcm", 16)[0], expected)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_jpeg_extended_of_12_bits_is_read_as_gdcm_reads_it(tmp_path, name):
    reader = gdcm.ImageReader()
    reader.SetFileName(str(SAMPLES / name))
    assert reader.Read()
    cells = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    pixels = np.frombuffer(cells, "<u2").reshape(1024, 256)
    make_dicom(pixels).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    expected, _ = dicom.load_and_prepare_image(tmp_path / "a.dcm")
    np.testing.assert_array_equal(dicom.load_and_prepare_image(SAMPLES / name)[0], expected)


@pytest.mark.parametrize("name", ["12 bits.dcm", os.fsdecode(b"12 bits \xf6.dcm")])
def test_jpeg_of_12_bits_is_read_under_the_name_of_8_and_whatever_its_file_is_called(tmp_path, name):
    dataset = dcmread(SAMPLES / "JPGExtended.dcm")
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    dataset.save_as(tmp_path / name)
    expected, _ = dicom.load_and_prepare_image(SAMPLES / "JPGExtended.dcm")
    np.testing.assert_array_equal(dicom.load_and_prepare_image(tmp_path / name)[0], expected)


# Mutated files

SEEDS = ["MR_small", "MR_small_implicit", "MR_small_bigendian", "image_dfl", "MR_small_RLE", "JPEG2000",
         "rtdose_1frame", "MR_small_jpeg_ls_lossless", "JPEGLSNearLossless_16", "MR_small_jp2klossless",
         "SC_rgb_small_odd_jpeg", "SC_rgb_jpeg_dcmtk", "SC_rgb_jpeg_gdcm", "SC_rgb_rle_2frame", "liver_expb_1frame"]
MUTATIONS = ["bits", "cut", "tags", "nested", "lengths", "values", "stream"]
SIZES = {b"\xff\xc0": (">H", 5, 7), b"\xff\xc3": (">H", 5, 7), b"\xff\xf7": (">H", 5, 7),  # marker: code, places
         b"\xff\x51": (">I", 6, 10, 22, 26)}


class Seed:
    """A DICOM file with the places of its data elements, unless it is deflated."""

    def __init__(self, path):
        self.data, header = path.read_bytes(), dcmread(path)
        self.implicit, little = header.original_encoding
        self.order = "<" if little else ">"
        deflated = header.file_meta.TransferSyntaxUID.is_deflated
        raw = [header.get_item(tag) for tag in header.keys() if not deflated]
        raw = [element for element in raw if isinstance(element, RawDataElement)]
        self.heads = [element.value_tell - (12 if not self.implicit and element.VR in EXPLICIT_VR_LENGTH_32 else 8)
                      for element in raw]
        self.values = [element.value_tell for element in raw if element.tag.group == 0x28 and element.length == 2]

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
            length = rng.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, len(data), rng.getrandbits(32)])
            data[at:at + 4] = self.pack("I", length)
        elif kind == "nested":
            at = rng.choice(self.heads)
            item = self.pack("IHHI", 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
            sequence = self.pack("HH", 0x0008, 0x1140) + (b"" if self.implicit else b"SQ\0\0") + item
            data[at:at] = sequence * rng.choice([1, 30, 1000, 30000])
        elif kind == "values":  # rows, columns, samples, bits
            for at in rng.sample(self.values, rng.choice([1, 2])):
                data[at:at + 2] = self.pack("H", rng.choice([0, 1, 3, 8, 12, 16, 32, 64, 255, 4096, 32768, 65535]))
        elif kind == "stream":  # the size that the compressed stream declares
            side = rng.choice([1, 300, 5000, 40000, 65535])
            for marker, (code, *places) in SIZES.items():
                at = data.find(marker, self.values[-1], -30)
                for place in places if at > 0 else ():
                    struct.pack_into(code, data, at + place, side)
        return data


def deflate_bomb(path):
    """A file of 3 MB whose data set inflates to 3 GB."""
    header = make_dicom(np.zeros((8, 8), np.uint8), transfer_syntax=uid.DeflatedExplicitVRLittleEndian)
    del header.PixelData
    header.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = 144 + struct.unpack("<I", content[140:144])[0]  # the data set begins behind the file meta information
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)

    def deflate(data):
        return compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)
    pixel_data = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 3 * 2**30)
    body = deflate(zlib.decompress(content[start:], -15) + pixel_data) + deflate(bytes(2**24)) * 192
    path.write_bytes(content[:start] + body + compressor.flush())


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
    """Folder of 1,000 mutated DICOM files and a deflate bomb."""
    folder, rng = tmp_path_factory.mktemp("mutated"), random.Random(5)
    seeds = [Seed(SAMPLES / f"{name}.dcm") for name in SEEDS]
    for number, kind in enumerate(islice(cycle(MUTATIONS), 1000)):
        (folder / f"{number:03} {kind}.dcm").write_bytes(rng.choice(seeds).mutate(kind, rng))
    deflate_bomb(folder / "bomb.dcm")
    return folder


def test_mutated_files_are_predicted_or_skipped(mutated, checkpoint, tmp_path):
    annotations, reasons, memory = predict_measured(mutated, checkpoint, tmp_path)
    crashed = sum("crashed" in reason for reason in reasons.values())
    slow = sum("took more than" in reason for reason in reasons.values())
    print(f"1001 files: {len(annotations)} decoded, {len(reasons) - crashed - slow} refused, {crashed} crashed their "
          f"decoder, {slow} took too long; largest reader {memory / 1e6:.0f} MB")
    assert len(annotations) + len(reasons) == 1001 and len(annotations) > 100 and len(reasons) > 100
    assert crashed < 100 and slow < 10
    assert memory < 2e9


def test_headers_of_mutated_files_are_read_or_left_out(mutated, tmp_path):
    started = time.monotonic()
    memory = run_measured("data_processing", "--type", "prediction", "--images", mutated, "--output", tmp_path)
    rows = len((tmp_path / "predict.csv").read_text().splitlines()) - 1
    print(f"1001 files: {rows} headers read, largest reader {memory / 1e6:.0f} MB")
    assert 100 < rows < 1000 and memory < 2e9 and time.monotonic() - started < 120


# Mistakes

@pytest.mark.parametrize("script, flags, words", [
    ("data_processing.py", [], ["nowhere/stage_2_train_images", "--images", "TRAINML_DATA_PATH"]),
    ("data_processing.py", ["--images", ".", "--labels", "no"], ["no/stage_2_train_labels.csv", "--labels", "DATA"]),
    ("data_processing.py", ["--images", ".", "--output", ROOT / "job.py" / "x"], ["job.py/x", "--output", "MODEL"]),
    ("train.py", [], ["nowhere/stage_2_train_images", "--data", "TRAINML_DATA_PATH"]),
    ("predict.py", ["--data", ".", "--model", "no.tar"], ["no.tar", "--model", "TRAINML_MODEL_PATH"]),
])
def test_missing_paths_are_one_line_and_status_2(tmp_path, script, flags, words):
    done = run(script, *flags, cwd=tmp_path, env={**os.environ, "TRAINML_DATA_PATH": "nowhere"})
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert all(word in only_line(done.stderr) for word in [f"{script}: error: ", *words])


def test_nothing_to_predict_is_status_1(tmp_path, checkpoint):
    (tmp_path / "a.dcm").write_text("no DICOM")
    done = run("predict.py", "--data", tmp_path, "--model", checkpoint, "--output", tmp_path / "output")
    assert done.returncode == 1 and not done.stderr and "0 images predicted" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("batch_size, message", [
    (8, r"the loss is nan at step \d of epoch 1, learning rate \S+e\+\d\d"),
    (16, "the validation loss is nan"),  # after the only step of the epoch
])
def test_a_loss_that_is_not_finite_is_one_line(train_flags, tmp_path, batch_size, message):
    flags = [*train_flags, "--batch-size", batch_size, "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", 1]
    done = run("train.py", *flags)
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
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if group_of(pid) == group]


def stop(process, signum):
    """Sends a signal, Ctrl-C to the whole group as a terminal does: output, errors, seconds, and what still lives."""
    group, started = processes_of(process.pid), time.monotonic()
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    while living(group) and time.monotonic() - started < 2 * STOP_SECONDS:
        time.sleep(0.1)
    return output, errors, seconds, living(group)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")


@needs_proc
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
    assert process.returncode == 128 + signum and errors == "train.py: stopped\n" and seconds < STOP_SECONDS
    assert f"--checkpoint {last}" in lines[-1] and not left
    assert not list(last.parent.glob(".*"))


@needs_proc
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_prediction_stops_with_its_readers(phantoms, checkpoint, tmp_path, signum):
    images = list((phantoms / "stage_2_train_images").iterdir())
    (tmp_path / "data").mkdir()
    for number in range(5000):
        (tmp_path / "data" / f"{number}.dcm").symlink_to(images[number % len(images)])
    output = tmp_path / "output"
    process = start("predict.py", "--data", tmp_path / "data", "--model", checkpoint, "--output", output,
                    "--workers", 3)
    assert process.stdout.readline().startswith("5000 files")
    while not list((output / "images").iterdir()):
        time.sleep(0.1)
    assert len(processes_of(process.pid)) == 4
    _, errors, seconds, left = stop(process, signum)
    print(f"ended {seconds:.1f} s after signal {signum}")
    assert seconds < STOP_SECONDS and not left
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum) and "Traceback" not in errors
    assert signum == signal.SIGKILL or not list(output.rglob(".*"))


HUNG = """
import sys, dicom
def hang(path):
    print("hung", flush=True)
    while True:
        pass
dicom.TIME_LIMIT = 2
list(dicom.read_files(hang, ["a", "b"], workers=2))
"""


@needs_proc
def test_readers_that_hang_do_not_outlive_a_killed_parent():
    process = subprocess.Popen(command("-c", HUNG), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert [process.stdout.readline() for _ in range(2)] == ["hung\n"] * 2
    *_, left = stop(process, signal.SIGKILL)
    assert not left


# Disks

@pytest.mark.parametrize("script, limit, status, old", [
    ("data_processing.py", 3_000, 2, ["train.csv"]),
    ("train.py", 50_000, 2, ["last.pth.tar"]),  # no room for the prepared images
    ("train.py", 10_000_000, 1, ["last.pth.tar", "prec.best.pth.tar", "loss.best.pth.tar"]),  # a checkpoint fails
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
    done = run(script, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == status and "File too large" in only_line(done.stderr)
    assert all((output / name).read_text() == "old" for name in old) and not list(output.rglob(".*"))


def run_on_tmpfs(options, folder, script, *flags):
    """Runs a script with a tmpfs of its own on `folder`, which holds `old` in annotations.json.

    After it, the output ends in that file's content and the names of all files.
    """
    private = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    if not shutil.which("unshare") or subprocess.run([*private, f"mount -t tmpfs tmpfs '{folder}'"]).returncode:
        pytest.skip("has no right to mount a tmpfs")
    shell = f"""
        cd '{folder.parent}'; mount -t tmpfs tmpfs {folder.name}; printf old > {folder.name}/annotations.json
        mount -o remount,{options} {folder.name}
        "$@" || status=$?
        echo; cat {folder.name}/annotations.json; echo; find {folder.name} -type f
        exit $status"""
    return subprocess.run([*private, shell, "sh", *command(ROOT / script, *flags)], capture_output=True, text=True,
                          timeout=300)


@pytest.mark.parametrize("options, script, status, message", [
    ("size=300k", "predict.py", 1, "No space left on device"),
    ("size=20m", "train.py", 2, "output has 21 MB left, a run needs"),
    ("ro", "predict.py", 2, "cannot write to .*output.*Read-only file system.*--output.*TRAINML_OUTPUT_PATH"),
])
def test_full_and_read_only_disks(phantoms, train_flags, checkpoint, tmp_path, options, script, status, message):
    output = tmp_path / "output"
    output.mkdir()
    images = phantoms / "stage_2_train_images"
    flags = {"train.py": train_flags, "predict.py": ["--data", images, "--model", checkpoint, "--output", output]}
    done = run_on_tmpfs(options, output, script, *flags[script])
    assert done.returncode == status and re.search(message, only_line(done.stderr))
    content, *names = done.stdout.splitlines()[done.stdout.splitlines().index("old"):]
    assert content == "old" and "output/annotations.json" in names and not any("/." in name for name in names)


CONTAINER = """
mount -t tmpfs -o ro tmpfs /dev/shm
for folder in /tmp /var/tmp {root}; do mount --rbind $folder $folder; mount -o remount,bind,ro $folder; done
mount -t tmpfs tmpfs {output}; cd {root}
"$@"
"""


def run_in_container(output, script, *flags):
    """Runs a script where only `output` can be written to: no temporary folder, no semaphores."""
    private = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    if not shutil.which("unshare") or subprocess.run([*private, f"mount -t tmpfs tmpfs '{output}'"]).returncode:
        pytest.skip("has no right to mount a tmpfs")
    words = [*private, CONTAINER.format(root=ROOT, output=output), "sh", *command(ROOT / script, *flags)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": ""})


@pytest.mark.parametrize("script", ["data_processing.py", "predict.py"])
def test_files_are_read_in_a_read_only_container(phantoms, checkpoint, tmp_path, script):
    images = phantoms / "stage_2_test_images"
    flags = {"data_processing.py": ["--type", "prediction", "--images", images],
             "predict.py": ["--data", images, "--model", checkpoint]}[script]
    done = run_in_container(tmp_path, script, *flags, "--output", tmp_path)
    assert done.returncode == 0 and not done.stderr and "4 images" in done.stdout.splitlines()[-1]


def test_training_without_a_temporary_folder_says_what_to_set(train_flags, tmp_path):
    (tmp_path / "save").mkdir()
    done = run_in_container(tmp_path / "save", "train.py", *train_flags, "--save", tmp_path / "save")
    assert done.returncode == 2 and "set TMPDIR" in only_line(done.stderr)


@pytest.mark.parametrize("locale", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_file_names_that_the_locale_cannot_spell(phantoms, checkpoint, tmp_path, locale):
    image = next((phantoms / "stage_2_test_images").iterdir())
    (tmp_path / "data").mkdir()
    for name in ("plain.dcm", "Ünïcode.dcm", os.fsdecode(b"f\xf6hn.dcm")):
        shutil.copy(image, tmp_path / "data" / name)
    environment = {**os.environ, **locale}
    output = ["--output", tmp_path / "output"]
    table = run("data_processing.py", "--type", "prediction", "--images", tmp_path / "data", *output, env=environment)
    done = run("predict.py", "--data", tmp_path / "data", "--model", checkpoint, *output, env=environment)
    assert table.returncode == done.returncode == 0 and not table.stderr + done.stderr
    ids = ["plain", "Ünïcode", r"f\xf6hn"]
    assert sorted(pd.read_csv(tmp_path / "output" / "predict.csv")["patientId"]) == sorted(ids)
    assert json.loads((tmp_path / "output" / "annotations.json").read_text("utf-8")).keys() == set(ids)
    assert sorted(path.stem for path in (tmp_path / "output" / "images").iterdir()) == sorted(ids)


WRITER = """
import itertools, sys
from job import atomic_write
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
