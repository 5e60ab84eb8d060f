"""Makes a synthetic data set in the layout of the RSNA Pneumonia Detection Challenge: chest phantoms with opacities.

    python sample_data.py                      # 240 training and 20 test images in data/
    python sample_data.py --train 40 --test 5 --output phantoms

Writes stage_2_train_images/, stage_2_test_images/, the two label tables, and stage_2_test_labels.csv with the truth of
the test images, which the challenge keeps to itself. The phantoms serve to try the scripts; what
is learned from them says nothing about radiographs. Boxes have the sizes of the challenge, but 40 % of the images are
positive (22.5 % there), so that a small sample has enough to learn from.
"""

import argparse
import functools
import io
import json
import math
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, config
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid

from job import InputError, atomic_write, default_path, make_folder, run

SIDE, CELL = 1024, 4  # pixels a side of an image, and of a cell of the grid (G = 256) that smooth things are drawn on
ROW, COLUMN = np.mgrid[: SIDE // CELL, : SIDE // CELL].astype(np.float32) + 0.5  # middle of each cell
IMAGES = ("stage_2_train_images", "stage_2_test_images")
TABLES = ("stage_2_train_labels.csv", "stage_2_detailed_class_info.csv", "stage_2_test_labels.csv")
MARKER = "synthetic.json"
OPACITY, NORMAL, OTHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
CLASSES = 4 * [OPACITY] + 3 * [NORMAL] + 3 * [OTHER]  # of ten images in a row
FINDINGS = ("nodules", "large heart", "raised diaphragm", "effusion", "interstitial", "pacemaker")
BOX_COUNTS = np.array([2614, 3266, 119, 13]) / 6012  # share of the challenge's positive images with 1, 2, 3, 4 boxes
SPACINGS = ("0.143", "0.14300000000000002", "0.168", "0.139", "0.171")  # mm; one is too long for its type, as there


def soft_step(distance, width):
    """0 to 1 as `distance` goes from below to above 0, smooth over about `width` on both sides."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * width))


def resize(array, side):
    """Interpolates a square array to float32 (side, side)."""
    return np.asarray(Image.fromarray(np.float32(array)).resize((side, side), Image.Resampling.BICUBIC))


def smooth_noise(rng, cells):
    """Noise of unit variance that varies over 1 / `cells` of the image; on the grid."""
    return resize(rng.standard_normal((cells, cells)), SIDE // CELL)


def body_frame(rng):
    """Grid coordinates x, y in pixels from the middle of a chest that is shifted, tilted and scaled at random."""
    x, y = CELL * COLUMN - SIDE / 2 - rng.normal(0, 20), CELL * ROW - SIDE / 2 - rng.normal(0, 25)
    angle, scale = math.radians(rng.normal(0, 3)), rng.uniform(0.9, 1.1)
    along, across = math.cos(angle) / scale, math.sin(angle) / scale
    return along * x + across * y, along * y - across * x


def draw_lungs(rng, x, y, findings):
    """Lung fields as shares of air, (2, G, G), the one on the image's left first; each ends at its diaphragm."""
    centre, width, height = rng.uniform(190, 220), rng.uniform(145, 180), rng.uniform(310, 370)
    base, changed, lungs = rng.uniform(230, 300), rng.choice([-1, 1]), []
    for side in (-1, 1):
        raised = rng.uniform(70, 130) if side == changed and {"raised diaphragm", "effusion"} & findings else 0
        bulge = -90 if raised and "effusion" in findings else rng.uniform(50, 90)
        lateral, vertical = (side * x - centre) / width, (y + 20) / height
        lean = 0.35 * np.minimum(vertical, 0) ** 2 + 0.1 * vertical
        inside = 1 - np.abs(lateral + lean) ** 2.4 - np.abs(vertical) ** 2.8
        diaphragm = base - raised + 12 * side + bulge * ((lateral + 0.2) ** 2 - 0.5)
        lungs.append(soft_step(inside, 0.07) * soft_step(diaphragm - y, 7))
    return np.stack(lungs)


def draw_heart(rng, x, y, findings):
    """Heart and great vessels as shares of soft tissue; the heart lies right of the image's middle."""
    width = rng.uniform(115, 145) * (1.45 if "large heart" in findings else 1)
    lean = x - 45 - 0.25 * (y - 150)
    heart = soft_step(1 - (lean / width) ** 2 - ((y - 150) / rng.uniform(125, 150)) ** 2, 0.07)
    knob = soft_step(1 - np.hypot(x - 45, y + 110) / 50, 0.12)
    vessels = soft_step(rng.uniform(50, 70) + 0.06 * np.abs(y) - np.abs(x), 7)
    return np.maximum.reduce([heart, knob, vessels])


def draw_bones(rng, x, y):
    """Ribs, clavicles and spine as brightness to add."""
    spacing, phase = rng.uniform(72, 88), rng.uniform(0, 1)
    back = (y - 90 * ((np.abs(x) - 150) / 200) ** 2) / spacing + phase
    front = (y + 0.6 * np.abs(x) + 0.0008 * x**2) / (1.25 * spacing) + phase
    ribs = sum(share * soft_step(0.24 - np.abs(band % 1 - 0.5), 0.03) for band, share in ((back, 1), (front, 0.5)))
    cage = soft_step(1 - (x / 390) ** 2 - ((y + 20) / 390) ** 4, 0.04) * soft_step(np.abs(x) - 40, 8)
    clavicle = soft_step(15 - np.abs(y + 275 - 0.12 * np.abs(x) + 30 * np.sin(np.abs(x) / 70)), 4)
    clavicle *= soft_step(np.abs(x) - 45, 5) * soft_step(370 - np.abs(x), 5)
    spine = soft_step(36 - np.abs(x), 5) * (0.8 + 0.2 * np.sin(y / 8))
    return rng.uniform(0.05, 0.1) * ribs * cage + 0.12 * clavicle + 0.08 * spine


def draw_chest(rng, findings):
    """Returns a chest without opacities, (G, G) of about 0..1 with air dark, and its lung fields (2, G, G)."""
    x, y = body_frame(rng)
    heart = draw_heart(rng, x, y, findings)
    lungs = draw_lungs(rng, x, y, findings) * (1 - heart)
    air = lungs.sum(0)
    shoulders = 90 * (x / 400) ** 2 - 260 * np.exp(-((x / rng.uniform(140, 170)) ** 2)) - rng.uniform(360, 400)
    trunk = soft_step(y - shoulders, 9) * soft_step(rng.uniform(430, 520) - 0.1 * y - np.abs(x), 9)
    image = trunk * (0.56 + 0.04 * smooth_noise(rng, 5) + 0.12 * soft_step(y - 250, 60))
    image += (0.14 * heart - rng.uniform(0.36, 0.44) * air + draw_bones(rng, x, y)) * trunk
    hila = np.exp(-np.hypot(np.abs(x) - 90, y - 10) / 110)
    coarse = 2 if "interstitial" in findings else 1
    image += air * (0.1 * hila + (0.012 * coarse + 0.06 * hila) * smooth_noise(rng, 60) + 0.03 * smooth_noise(rng, 16))
    for _ in range(rng.integers(1, 4) if "nodules" in findings else 0):
        row, column = rng.choice(np.argwhere(air > 0.9))
        image += 0.25 * soft_step(rng.uniform(3, 7) - np.hypot(ROW - row, COLUMN - column), 0.5)
    return image, lungs


def draw_box_size(rng):
    """Width and height in pixels, with about the challenge's 5th, 50th and 95th percentiles of both and of the area."""
    across, down = rng.multivariate_normal([0, 0], [[1, 0.63], [0.63, 1]])
    return 217 * np.exp((0.34 if across < 0 else 0.23) * across), 298 * np.exp((0.55 if down < 0 else 0.45) * down)


def draw_opacity(rng, lung):
    """A soft ellipse, lobe or cluster in one lung field, (G, G) with peak 1, and its box [x, y, w, h] in pixels, the
    extent of what exceeds 0.35 of the peak."""
    cells = np.argwhere(lung > 0.5)[:, ::-1]
    low, high = cells.min(0), cells.max(0) + 1
    half = np.minimum(np.divide(draw_box_size(rng), CELL), high - low) / 2
    (x, y), (a, b) = np.clip(rng.choice(cells), low + half, high - half).tolist(), half.tolist()
    across, down = (COLUMN - x) / a, (ROW - y) / b
    edge, kind, blur = 1 - 0.06 * smooth_noise(rng, 20), rng.integers(3), rng.uniform(0.05, 0.16)
    patch = soft_step(edge - np.hypot(across, down), blur)
    if kind == 1:
        fissure = rng.choice([-1, 1]) * (down + rng.uniform(-0.4, 0.4) * across)
        patch = soft_step(edge - (across**4 + down**4) ** 0.25, blur) * soft_step(0.6 - fissure, 0.03)
    if kind == 2:
        patch = patch * (0.6 + 0.4 * soft_step(smooth_noise(rng, 22), 0.3))
    patch = patch * np.sqrt(lung) * (1 + 0.06 * smooth_noise(rng, 50))
    patch = patch / patch.max()
    cells = np.argwhere(patch > 0.35)[:, ::-1]
    low, high = cells.min(0), cells.max(0) + 1
    return patch, [float(CELL * value) for value in (*low, *(high - low))]


def opacity_fields(rng, lungs):
    """Where opacities go, one field each: one or two have a lung each, three or four an upper or lower half of one."""
    count = 1 + rng.choice(len(BOX_COUNTS), p=BOX_COUNTS)
    if count > 2:
        upper = ROW < (ROW * lungs).sum((1, 2), keepdims=True) / lungs.sum((1, 2), keepdims=True)
        lungs = np.concatenate([lungs * upper, lungs * ~upper])
    return rng.permutation(lungs)[:count]


def draw_objects(rng, findings, view):
    """Side letter, electrode wires and pacemaker as brightness to add, uint8 (SIDE, SIDE)."""
    canvas = Image.new("L", (SIDE // 2, SIDE // 2))
    draw = ImageDraw.Draw(canvas)
    steps = np.linspace(0, 1, 30)[:, None]
    for _ in range(rng.integers(1, 4) if rng.random() < (0.6 if view == "AP" else 0.1) else 0):
        start, bend, end = rng.uniform([120, 0], [400, 420], (3, 2))
        curve = start + steps * (end - start) + np.sin(np.pi * steps) * (bend - start) / 3
        draw.line(curve.ravel().tolist(), fill=60, width=2)
    if "pacemaker" in findings:
        left, top = rng.uniform([330, 100], [380, 140])
        draw.line([(left + 10, top + 20), (290, 170), (270, 250), (310, 340)], fill=90, width=3, joint="curve")
        draw.rounded_rectangle([left, top, left + 50, top + 40], radius=10, fill=110)
    if rng.random() < 0.7:
        draw.text(rng.uniform([25, 20], [60, 90]), "R", fill=150, font=ImageFont.load_default(rng.integers(24, 44)))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def draw_patient(rng, label, view):
    """Returns a phantom as uint8 (SIDE, SIDE), air dark, and its boxes [[x, y, w, h], ...] in pixels."""
    odds = {NORMAL: 0, OPACITY: 0.3, OTHER: 1}[label]
    count = rng.integers(1, 3) if rng.random() < odds else 0
    findings = set(rng.choice(FINDINGS, count, replace=False).tolist())
    image, lungs = draw_chest(rng, findings)
    boxes = []
    for field in opacity_fields(rng, lungs) if label == OPACITY else ():
        patch, box = draw_opacity(rng, field)
        image = image + rng.uniform(0.14, 0.36) * patch
        boxes.append(box)
    image = rng.uniform(0, 25) + rng.uniform(190, 240) * np.clip(image, 0, 1) ** rng.uniform(0.75, 1.3)
    image = resize(image, SIDE) + draw_objects(rng, findings, view)
    grain = np.frombuffer(rng.bytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE)
    image += np.float32(rng.uniform(3, 12) / 128) * (grain - np.float32(127.5))
    return np.clip(image, 0, 255).astype(np.uint8), boxes


def encode_jpeg(image):
    """Baseline JPEG stream of a uint8 image without the JFIF segment, which the challenge's files lack."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    stream = buffer.getvalue()
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


def make_header(rng, patient_id, view):
    """Data set with a challenge file's tags, pixels apart; the age is a bare number, one in 200 a typing error."""
    age = rng.choice([148, 151, 155]) if rng.random() < 0.005 else rng.integers(3, 92)
    study, series, instance = (generate_uid(entropy_srcs=[patient_id, level]) for level in ("study", "series", "image"))
    tags = {
        "SpecificCharacterSet": "ISO_IR 100", "SOPClassUID": SecondaryCaptureImageStorage, "SOPInstanceUID": instance,
        "StudyDate": "19010101", "StudyTime": "000000.00", "AccessionNumber": "", "Modality": "CR",
        "ConversionType": "WSD", "ReferringPhysicianName": "", "SeriesDescription": f"view: {view}",
        "PatientName": patient_id, "PatientID": patient_id, "PatientBirthDate": "",
        "PatientSex": str(rng.choice(["M", "F"])), "PatientAge": str(age), "BodyPartExamined": "CHEST",
        "ViewPosition": view, "StudyInstanceUID": study, "SeriesInstanceUID": series, "StudyID": "",
        "SeriesNumber": "1", "InstanceNumber": "1", "PatientOrientation": "",
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": SIDE, "Columns": SIDE,
        "PixelSpacing": 2 * [str(rng.choice(SPACINGS))], "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
        "PixelRepresentation": 0, "LossyImageCompression": "01", "LossyImageCompressionMethod": "ISO_10918_1"}
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    for keyword, value in tags.items():
        setattr(header, keyword, value)
    return header


def patient_id_of(seed, split, index):
    """Identifier of the image `index` of split 0 (training) or 1 (test); looks like the challenge's."""
    return str(uuid.UUID(bytes=np.random.default_rng([seed, split, index]).bytes(16), version=4))


def write_patient(index, *, folder, seed, split):
    """Writes one DICOM file, which depends on seed, split and index alone; returns its id, class and boxes."""
    rng = np.random.default_rng([seed, split, index, 1])
    patient_id, label = patient_id_of(seed, split, index), CLASSES[index % len(CLASSES)]
    view = "AP" if rng.random() < (0.78 if label == OPACITY else 0.36) else "PA"
    image, boxes = draw_patient(rng, label, view)
    with config.disable_value_validation():
        dataset = make_header(rng, patient_id, view)
        dataset.PixelData = encapsulate([encode_jpeg(image)])
        dataset.save_as(Path(folder, f"{patient_id}.dcm"), enforce_file_format=True)
    return patient_id, label, boxes


def write_images(folder, count, *, seed, split, workers=None):
    """Writes `count` images into a new `folder` on all cores, or on `workers`; returns their ids, classes, boxes."""
    Path(folder).mkdir()
    write = functools.partial(write_patient, folder=folder, seed=seed, split=split)
    try:
        pool = ProcessPoolExecutor(workers)
    except OSError:  # its semaphores need /dev/shm, which a container may lack
        return [write(index) for index in range(count)]
    with pool:
        return list(pool.map(write, range(count), chunksize=4))


def write_tables(folder, patients, new_patients):
    """Writes the label tables in order of the ids: a row per box, or one with empty cells where there is none."""
    labels, classes, new_labels = (Path(folder, name) for name in TABLES)
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    write_table(labels, patients, columns)
    write_table(classes, patients, ["patientId", "class"])
    write_table(new_labels, new_patients, columns)


def write_table(path, patients, columns):
    rows = []
    for patient_id, label, boxes in sorted(patients):
        for box in boxes or [[None] * 4]:
            rows.append((patient_id, *box, int(label == OPACITY), label))
    table = pd.DataFrame(rows, columns=["patientId", "x", "y", "width", "height", "Target", "class"])
    with atomic_write(path) as file:
        table[columns].to_csv(file, index=False)


def ids_in(path):
    """Patient ids that an image folder or a table holds."""
    if path.is_dir():
        return {entry.name.removesuffix(".dcm") for entry in path.iterdir() if not entry.name.startswith(".")}
    return {line.split(",")[0] for line in path.read_text("utf-8", "replace").splitlines()[1:]}


def remove_earlier(folder):
    """Removes what an earlier run made; keeps everything and raises InputError if anything else is there."""
    try:
        made = json.loads(Path(folder, MARKER).read_text())
        counts = enumerate([made["train"], made["test"]])
        known = {patient_id_of(made["seed"], split, index) for split, count in counts for index in range(count)}
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    paths = [path for path in (Path(folder, name) for name in IMAGES + TABLES) if path.exists() or path.is_symlink()]
    foreign = [path.name for path in paths if known is None or path.is_symlink() or not ids_in(path) <= known]
    if foreign:
        raise InputError(f"{folder} holds data that sample_data.py did not make ({', '.join(foreign)}): "
                         "give another folder with --output, or set TRAINML_DATA_PATH")
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--train", type=int, default=240, help="number of training images")
    add("--test", type=int, default=20, help="number of test images")
    add("--seed", type=int, default=42, help="the same seed gives the same data")
    add("--output", default=default_path("TRAINML_DATA_PATH"), help="folder for the data set")
    args = parser.parse_args(argv)
    if args.train < 1 or min(args.test, args.seed) < 0:
        parser.error("--train must be 1 or more, --test and --seed 0 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    remove_earlier(args.output)
    folder = make_folder(args.output, flag="--output", variable="TRAINML_DATA_PATH")
    with atomic_write(folder / MARKER) as file:
        file.write(json.dumps({"train": args.train, "test": args.test, "seed": args.seed}).encode())
    patients = write_images(folder / IMAGES[0], args.train, seed=args.seed, split=0)
    new_patients = write_images(folder / IMAGES[1], args.test, seed=args.seed, split=1)
    write_tables(folder, patients, new_patients)
    counts = [len(boxes) for *_, boxes in patients if boxes]
    at = "" if args.output == default_path("TRAINML_DATA_PATH") else f", with TRAINML_DATA_PATH={folder}"
    print(f"{folder}: {args.train} training images ({len(counts)} positive, {sum(counts)} boxes), {args.test} test "
          f"images; next: python data_processing.py{at}")


if __name__ == "__main__":
    run(main)
