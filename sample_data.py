"""Makes a synthetic data set in the layout of the RSNA Pneumonia Detection Challenge.

    python sample_data.py                      # 240 training and 20 test images in data/
    python sample_data.py --train 40 --test 5 --output phantoms
    python sample_data.py --layout rsna        # as in RSNA's own release

Writes chest phantoms with opacities as DICOM files, the two label tables, and
stage_2_test_labels.csv with the truth of the test images, which the challenge keeps to itself. In
the layout of RSNA's own release, the same phantoms lie in a folder for each study, with annotations
and mapping as JSON files, and Kaggle's sample submission tells the test images.

A fifth of the chests have a second image, of the same patient. The phantoms are for trying the
scripts; what is learned from them says nothing about radiographs. Boxes have the challenge's sizes,
but 40 % of the images are positive (22.5 % there), so that a small sample has enough to learn from.
"""

import functools
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image
from pydicom import Dataset, config
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid

import cli
import release

IMAGES = cli.TRAIN_IMAGES, cli.TEST_IMAGES
TABLES = cli.LABELS, cli.CLASSES, cli.TEST_LABELS
# of RSNA's own release; the name of its image folder varies
RELEASE_IMAGES = "mdai_rsna_project_phantoms_images"
RELEASE_FILES = (
    "pneumonia-challenge-annotations-adjudicated-kaggle_2018.json",
    "pneumonia-challenge-dataset-mappings_2018.json", cli.SUBMISSION)
COLUMNS = "patientId", "x", "y", "width", "height", "Target", "class"
SIDE, CELL = cli.IMAGE_SIDE, 4  # pixels a side of an image, and of a cell of the drawing grid
# middle of each cell, (G, G) with G = SIDE / CELL = 256
ROW, COLUMN = np.mgrid[:SIDE // CELL, :SIDE // CELL].astype(np.float32) + 0.5
OPACITY, NORMAL, OTHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
READER = "Team 1"  # label group of single readers, whose boxes are not the truth
CLASSES = 4 * [OPACITY] + 3 * [NORMAL] + 3 * [OTHER]  # of ten images in a row
FINDINGS = "nodules", "large heart", "raised diaphragm", "effusion", "interstitial"
FINDING_ODDS = {NORMAL: 0, OPACITY: 0.3, OTHER: 1}
# the challenge's: share of the positive images with 1, 2, 3 and 4 boxes; headers
BOX_COUNTS = np.array([2614, 3266, 119, 13]) / 6012
SPACINGS = "0.143", "0.14300000000000002", "0.168", "0.139", "0.171"  # mm; one is too long for a DS
HEADER = {
    "SpecificCharacterSet": "ISO_IR 100", "SOPClassUID": SecondaryCaptureImageStorage,
    "StudyDate": "19010101", "StudyTime": "000000.00", "AccessionNumber": "", "Modality": "CR",
    "ConversionType": "WSD", "ReferringPhysicianName": "", "PatientBirthDate": "",
    "BodyPartExamined": "CHEST", "StudyID": "", "SeriesNumber": "1", "InstanceNumber": "1",
    "PatientOrientation": "", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
    "Rows": SIDE, "Columns": SIDE, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
    "PixelRepresentation": 0, "LossyImageCompression": "01",
    "LossyImageCompressionMethod": "ISO_10918_1",
}


def soft_step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 as `distance` goes from below to above 0, smooth over about `width` on both sides."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * width))


def resize(array: np.ndarray, side: int) -> np.ndarray:
    """Interpolates a square array to float32 (side, side)."""
    image = Image.fromarray(np.float32(array))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def smooth_noise(rng: Generator, cells: int) -> np.ndarray:
    """Noise (G, G) of unit variance that varies over 1 / `cells` of the image."""
    return resize(rng.standard_normal((cells, cells)), SIDE // CELL)


def body_frame(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels x, y (G, G) from the middle of a chest that is shifted, tilted and scaled."""
    x = CELL * COLUMN - SIDE / 2 - rng.normal(0, 20)
    y = CELL * ROW - SIDE / 2 - rng.normal(0, 25)
    angle, scale = math.radians(rng.normal(0, 3)), rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    return cos * x + sin * y, cos * y - sin * x


def draw_lungs(rng: Generator, x: np.ndarray, y: np.ndarray, findings: set[str]) -> np.ndarray:
    """Lung fields as shares of air (2, G, G), the image's left one first, down to the diaphragm."""
    centre, width, height = rng.uniform(190, 220), rng.uniform(145, 180), rng.uniform(310, 370)
    base, changed = rng.uniform(230, 300), rng.choice([-1, 1])
    lungs = []
    for side in (-1, 1):
        is_raised = side == changed and not findings.isdisjoint({"raised diaphragm", "effusion"})
        raised = rng.uniform(70, 130) if is_raised else 0
        bulge = -90 if is_raised and "effusion" in findings else rng.uniform(50, 90)
        lateral, vertical = (side * x - centre) / width, (y + 20) / height
        lean = 0.35 * np.minimum(vertical, 0) ** 2 + 0.1 * vertical
        inside = 1 - np.abs(lateral + lean) ** 2.4 - np.abs(vertical) ** 2.8
        diaphragm = base - raised + 12 * side + bulge * ((lateral + 0.2) ** 2 - 0.5)
        lungs.append(soft_step(inside, 0.07) * soft_step(diaphragm - y, 7))
    return np.stack(lungs)


def draw_heart(rng: Generator, x: np.ndarray, y: np.ndarray, findings: set[str]) -> np.ndarray:
    """Heart and great vessels as shares of soft tissue; the heart lies right of the middle."""
    width = rng.uniform(115, 145) * (1.45 if "large heart" in findings else 1)
    height = rng.uniform(125, 150)
    lean = x - 45 - 0.25 * (y - 150)
    heart = soft_step(1 - (lean / width) ** 2 - ((y - 150) / height) ** 2, 0.07)
    knob = soft_step(1 - np.hypot(x - 45, y + 110) / 50, 0.12)
    vessels = soft_step(rng.uniform(50, 70) + 0.06 * np.abs(y) - np.abs(x), 7)
    return np.maximum.reduce([heart, knob, vessels])


def draw_bones(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ribs, clavicles and spine as brightness to add."""
    spacing, phase = rng.uniform(72, 88), rng.uniform(0, 1)
    off = np.abs(x)  # from the midline
    back = (y - 90 * ((off - 150) / 200) ** 2) / spacing + phase
    front = (y + 0.6 * off + 0.0008 * x**2) / (1.25 * spacing) + phase
    ribs = soft_step(0.24 - np.abs(back % 1 - 0.5), 0.03)
    ribs = ribs + 0.5 * soft_step(0.24 - np.abs(front % 1 - 0.5), 0.03)
    cage = soft_step(1 - (x / 390) ** 2 - ((y + 20) / 390) ** 4, 0.04) * soft_step(off - 40, 8)
    clavicle = soft_step(15 - np.abs(y + 275 - 0.12 * off + 30 * np.sin(off / 70)), 4)
    clavicle *= soft_step(off - 45, 5) * soft_step(370 - off, 5)
    spine = soft_step(36 - off, 5) * (0.8 + 0.2 * np.sin(y / 8))
    return rng.uniform(0.05, 0.1) * ribs * cage + 0.12 * clavicle + 0.08 * spine


def draw_chest(rng: Generator, findings: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """A chest without opacities, (G, G) in about 0..1 with air dark, and its lungs (2, G, G)."""
    x, y = body_frame(rng)
    heart = draw_heart(rng, x, y, findings)
    lungs = draw_lungs(rng, x, y, findings) * (1 - heart)
    air = lungs.sum(0)
    # trunk
    neck = 260 * np.exp(-((x / rng.uniform(140, 170)) ** 2))
    shoulders = 90 * (x / 400) ** 2 - neck - rng.uniform(360, 400)
    trunk = soft_step(y - shoulders, 9)
    trunk = trunk * soft_step(rng.uniform(430, 520) - 0.1 * y - np.abs(x), 9)
    image = trunk * (0.56 + 0.04 * smooth_noise(rng, 5) + 0.12 * soft_step(y - 250, 60))
    image += (0.14 * heart - rng.uniform(0.36, 0.44) * air + draw_bones(rng, x, y)) * trunk
    # markings of the lungs
    hila = np.exp(-np.hypot(np.abs(x) - 90, y - 10) / 110)
    fine = 0.012 * (2 if "interstitial" in findings else 1) + 0.06 * hila
    image += air * (0.1 * hila + fine * smooth_noise(rng, 60) + 0.03 * smooth_noise(rng, 16))
    for _ in range(rng.integers(1, 4) if "nodules" in findings else 0):
        row, column = rng.choice(np.argwhere(air > 0.9))
        radius = rng.uniform(3, 7)
        image += 0.25 * soft_step(radius - np.hypot(ROW - row, COLUMN - column), 0.5)
    return image, lungs


def draw_box_size(rng: Generator) -> tuple[float, float]:
    """Width and height in pixels, spread like the challenge's, and so are the areas."""
    across, down = rng.multivariate_normal([0, 0], [[1, 0.63], [0.63, 1]])
    width = 217 * np.exp((0.34 if across < 0 else 0.23) * across)
    return width, 298 * np.exp((0.55 if down < 0 else 0.45) * down)


def draw_opacity(rng: Generator, lung: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """An opacity in one lung, (G, G) with peak 1, and the box of what exceeds 0.35, in pixels."""
    cells = np.argwhere(lung > 0.5)[:, ::-1]
    low, high = cells.min(0), cells.max(0) + 1
    half = np.minimum(np.divide(draw_box_size(rng), CELL), high - low) / 2
    x, y = np.clip(rng.choice(cells), low + half, high - half).tolist()
    a, b = half.tolist()
    across, down = (COLUMN - x) / a, (ROW - y) / b
    edge = 1 - 0.06 * smooth_noise(rng, 20)
    kind, blur = rng.choice(["ellipse", "lobe", "cluster"]), rng.uniform(0.05, 0.16)
    patch = soft_step(edge - np.hypot(across, down), blur)
    if kind == "lobe":
        fissure = rng.choice([-1, 1]) * (down + rng.uniform(-0.4, 0.4) * across)
        patch = soft_step(edge - (across**4 + down**4) ** 0.25, blur)
        patch = patch * soft_step(0.6 - fissure, 0.03)
    elif kind == "cluster":
        patch = patch * (0.6 + 0.4 * soft_step(smooth_noise(rng, 22), 0.3))
    patch = patch * np.sqrt(lung) * (1 + 0.06 * smooth_noise(rng, 50))
    patch = patch / patch.max()
    cells = np.argwhere(patch > 0.35)[:, ::-1]
    low, high = cells.min(0), cells.max(0) + 1
    return patch, [float(CELL * value) for value in (*low, *(high - low))]


def opacity_fields(rng: Generator, lungs: np.ndarray) -> np.ndarray:
    """Where opacities go, (n, G, G): one or two have a lung each, three or four half of one."""
    count = 1 + rng.choice(len(BOX_COUNTS), p=BOX_COUNTS)
    if count > 2:
        middle = (ROW * lungs).sum((1, 2), keepdims=True) / lungs.sum((1, 2), keepdims=True)
        lungs = np.concatenate([lungs * (ROW < middle), lungs * (ROW >= middle)])
    return rng.permutation(lungs)[:count]


def draw_findings(rng: Generator, label: str) -> set[str]:
    """What else a chest shows whose first image has this class."""
    count = rng.integers(1, 3) if rng.random() < FINDING_ODDS[label] else 0
    return set(rng.choice(FINDINGS, count, replace=False).tolist())


def draw_image(rng: Generator, image: np.ndarray, fields: np.ndarray,
               ) -> tuple[np.ndarray, list[list[float]]]:
    """A phantom, uint8 (SIDE, SIDE) with air dark, of a chest (G, G) with an opacity in each of the
    fields (n, G, G), and its boxes [[x, y, w, h], ...] in pixels."""
    boxes = []
    for field in fields:
        patch, box = draw_opacity(rng, field)
        image = image + rng.uniform(0.14, 0.36) * patch
        boxes.append(box)
    black, contrast, gamma = rng.uniform(0, 25), rng.uniform(190, 240), rng.uniform(0.75, 1.3)
    image = resize(black + contrast * np.clip(image, 0, 1) ** gamma, SIDE)
    grain = rng.integers(256, size=(SIDE, SIDE), dtype=np.uint8)
    image = image + np.float32(rng.uniform(3, 12) / 128) * (grain - np.float32(127.5))
    return np.clip(image, 0, 255).astype(np.uint8), boxes


def encode_jpeg(image: np.ndarray) -> bytes:
    """Baseline JPEG stream without the JFIF segment, which the challenge's files lack."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    stream = buffer.getvalue()
    segment_end = 4 + int.from_bytes(stream[4:6], "big")
    return stream[:2] + stream[segment_end:]


def make_header(rng: Generator, patient_id: str, view: str) -> Dataset:
    """The challenge's tags, pixels apart; the age is a bare number, one in 200 a typing error."""
    age = rng.choice([148, 151, 155]) if rng.random() < 0.005 else rng.integers(3, 92)
    header = Dataset()
    header.ensure_file_meta()
    header.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    header.update(HEADER | uids_of(patient_id))
    header.PatientID = header.PatientName = patient_id
    header.PatientAge = str(age)
    header.PatientSex = str(rng.choice(["M", "F"]))
    header.ViewPosition = view
    header.SeriesDescription = f"view: {view}"
    header.PixelSpacing = 2 * [str(rng.choice(SPACINGS))]
    return header


def uids_of(patient_id: str) -> dict[str, str]:
    """The DICOM UIDs of an image, which is a study of its own."""
    names = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series", "SOPInstanceUID": "image"}
    return {key: generate_uid(entropy_srcs=[patient_id, name]) for key, name in names.items()}


def patient_id_of(seed: int, split: int, index: int) -> str:
    """Id of image `index` of split 0 (training) or 1 (test); looks like the challenge's."""
    return str(uuid.UUID(bytes=default_rng([seed, split, index]).bytes(16), version=4))


def first_image(index: int) -> int:
    """Index of the first image of the chest that image `index` shows: a fifth of the chests have a
    second image, three later."""
    return index - 3 if index % 6 == 5 else index


def patient_number(split: int, index: int) -> int:
    """Number of the patient in an image, as NIH might give it."""
    return 10_000 * (split + 1) + first_image(index)


def write_patient(index: int, *, folder: Path, seed: int, split: int,
                  layout: str) -> tuple[str, str, list]:
    """Writes one DICOM file, which depends on these numbers alone; returns id, class and boxes."""
    rng, first = default_rng([seed, split, index, 1]), first_image(index)
    chest_rng = default_rng([seed, split, first, 2])
    patient_id, label = patient_id_of(seed, split, index), CLASSES[index % len(CLASSES)]
    findings = draw_findings(chest_rng, CLASSES[first % len(CLASSES)])
    if first != index and label != OPACITY:
        label = OTHER if findings else NORMAL
    view = "AP" if rng.random() < (0.78 if label == OPACITY else 0.36) else "PA"
    chest, lungs = draw_chest(chest_rng, findings)
    fields = opacity_fields(rng, lungs) if label == OPACITY else lungs[:0]
    image, boxes = draw_image(rng, chest, fields)
    dataset = make_header(chest_rng, patient_id, view)
    if index % 6 in (2, 5):  # chests of two images; in the challenge PatientID repeats the id
        dataset.PatientID = dataset.PatientName = str(patient_number(split, index))
    dataset.PixelData = encapsulate([encode_jpeg(image)])
    path = folder / f"{patient_id}.dcm"
    if layout == "rsna":
        dataset.PatientID = dataset.PatientName = str(uuid.uuid5(uuid.NAMESPACE_OID, patient_id))
        study, series, image = uids_of(patient_id).values()
        path = folder / study / series / f"{image}.dcm"
        path.parent.mkdir(parents=True)
    dataset.save_as(path, enforce_file_format=True)
    return patient_id, label, boxes


def write_images(folder: Path, count: int, *, seed: int, split: int,
                 layout: str = "kaggle") -> list[tuple[str, str, list]]:
    """Writes `count` images into a folder; returns their ids, classes and boxes."""
    folder.mkdir(exist_ok=True)
    write = functools.partial(write_patient, folder=folder, seed=seed, split=split, layout=layout)
    # threads: NumPy and Pillow release the interpreter's lock, and a pool of processes would need
    # /dev/shm, which a container may lack; pydicom's switch, for the DS that is too long, is global
    with config.disable_value_validation(), ThreadPoolExecutor(cli.usable_cores()) as pool:
        return list(pool.map(write, range(count)))


def table_rows(patients: list[tuple[str, str, list]]) -> list[tuple]:
    """COLUMNS and their rows in order of the ids: one for each box, or one with empty cells."""
    return [COLUMNS] + [(patient_id, *box, int(label == OPACITY), label)
                        for patient_id, label, boxes in sorted(patients)
                        for box in boxes or [4 * [""]]]


def write_tables(folder: Path, patients: list, new_patients: list) -> None:
    """Writes the label tables of training and test images."""
    labels, classes, new_labels = (folder / name for name in TABLES)
    rows = table_rows(patients)
    cli.write_csv(labels, [row[:-1] for row in rows])
    cli.write_csv(classes, [(row[0], row[-1]) for row in rows])
    cli.write_csv(new_labels, [row[:-1] for row in table_rows(new_patients)])


def write_release(folder: Path, patients: list, new_patients: list) -> None:
    """Writes the annotations in the form of MD.ai's export, the mapping to the ids and to patients
    named like NIH's, and the sample submission."""
    groups = {group: {name: f"L_{group}_{name}" for name in (OPACITY, OTHER, NORMAL)}
              for group in (release.TRUTH, READER)}
    annotations = [
        {**uids_of(patient_id), "labelId": labels[label], "width": SIDE, "height": SIDE,
         "data": box and dict(zip(COLUMNS[1:5], np.add(box, 10 * (group == READER)).tolist()))}
        for patient_id, label, boxes in patients + new_patients
        for group, labels in groups.items() for box in boxes or [None]]
    annotations.append({"labelId": "L_question", "data": None})  # on a study, not on an image
    project = {"name": "Phantoms", "labelGroups": [
        {"name": group, "labels": [{"id": key, "name": name} for name, key in labels.items()]}
        for group, labels in groups.items()], "datasets": [{"annotations": annotations}]}
    mapping = [{"subset_img_id": patient_id, **uids_of(patient_id),
                "img_id": f"{patient_number(split, index):08d}_{index:03d}.png"}
               for split, images in enumerate((patients, new_patients))
               for index, (patient_id, *_) in enumerate(images)]
    annotations_path, mapping_path, submission = (folder / name for name in RELEASE_FILES)
    cli.write_text(annotations_path, json.dumps(project))
    cli.write_text(mapping_path, json.dumps(mapping))
    cli.write_csv(submission, [("patientId", "PredictionString"),
                               *sorted((patient_id, "") for patient_id, *_ in new_patients)])


def remove_earlier(folder: Path) -> None:
    """Removes what an earlier run made; raises InputError, removing nothing, if sample_data.py did
    not make the folder or images were added to it."""
    try:
        made = json.loads((folder / cli.MARKER).read_text())
        counts = {cli.TRAIN_IMAGES: made["train"], cli.TEST_IMAGES: made["test"],
                  RELEASE_IMAGES: made["train"] + made["test"]}
    except (OSError, ValueError, KeyError, TypeError):
        counts = {}
    names = *IMAGES, *TABLES, RELEASE_IMAGES, *RELEASE_FILES
    paths = [folder / name for name in names if os.path.lexists(folder / name)]
    for path in paths:
        more = path.is_dir() and len(list(path.glob("[!.]*"))) > counts.get(path.name, 0)
        cli.refuse_if(not counts or more or path.is_symlink(),
                      f"{path} holds data that sample_data.py did not make: give another folder "
                      "with --output, or set TRAINML_DATA_PATH")
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--output", kind="output", help="folder for the data set",
                    variable="TRAINML_DATA_PATH")
    add = parser.add_argument
    add("--train", type=cli.bounded(1, math.inf, int), default=240,
        help="number of training images (default: %(default)s)")
    add("--test", type=cli.bounded(0, math.inf, int), default=20,
        help="number of test images (default: %(default)s)")
    add("--seed", type=cli.bounded(0, math.inf, int), default=42,
        help="the same seed gives the same data (default: %(default)s)")
    add("--layout", choices=["kaggle", "rsna"], default="kaggle",
        help="Kaggle's files, or those of RSNA's own release (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.check_paths(args)
    folder = Path(args.output)
    remove_earlier(folder)
    made = {"train": args.train, "test": args.test, "seed": args.seed}
    cli.write_text(folder / cli.MARKER, json.dumps(made))
    folders, write = IMAGES, write_tables
    if args.layout == "rsna":
        folders, write = 2 * [RELEASE_IMAGES], write_release
    patients, new_patients = (
        write_images(folder / name, count, seed=args.seed, split=split, layout=args.layout)
        for split, (name, count) in enumerate(zip(folders, (args.train, args.test))))
    write(folder, patients, new_patients)
    counts = [len(boxes) for _, _, boxes in patients if boxes]
    is_default = args.output == cli.default_path("TRAINML_DATA_PATH")
    hint = "" if is_default else f", with TRAINML_DATA_PATH={folder}"
    print(f"{folder}: {args.train} training images ({len(counts)} positive, {sum(counts)} boxes), "
          f"{args.test} test images; next: python data_processing.py{hint}")


if __name__ == "__main__":
    cli.run(main)
