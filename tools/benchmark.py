"""Times every stage of the pipeline beside the least time that it could take on this machine.

    python -m tools.benchmark                             # some minutes without a GPU
    python -m tools.benchmark --images 50 100 200         # is it linear?
    python -m tools.benchmark --images 50 --cache 26684   # and the memory of a full set

Reads a folder of DICOM files with JPEG streams, repeated where --images asks for more, and draws
boxes and masks at random. Prints a table of median wall-clock times for each number of images and
writes all to --json.
"""

import argparse
import io
import json
import math
import re
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom import dcmread
from scipy import ndimage
from torch.utils.flop_counter import FlopCounterMode

import cli
import metrics
import train
from data_processing import Labels, read_headers
from dataset import PneumoniaDataset
from engine import train_one_epoch, training_loader
from model import PneumoniaUNET, Runtime, choose_runtime
from radiographs import find_dicom_files, read_header, read_radiograph
from release import image_folder
from results import IMAGE_SIZE, Overlay, draw_overlay, encode_png, make_overlay, save_overlay

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}  # of the product that gives the peak rate
DISTINCT = 64  # masks drawn; more images repeat them
STAGES = {  # the limit of each
    "header table": "bare header reads, shared by the workers",
    "prepare": "plain Pillow decode of the JPEG streams, shared by the workers",
    "training sample": "resampling image and mask on a ready grid",
    "training step": "the network's operations at the rate of a matrix product",
    "inference": "the network's operations at the rate of a matrix product",
    "threshold search": "labelling the mask once for each threshold",
    "scoring": "labelling the mask once",
    "overlay PNG": "encoding the PNG alone",
}


class Stage(NamedTuple):
    """What is timed and what limits it, each with the number of images that one call covers."""
    work: Callable[[], Any]
    images: int
    limit: Callable[[], Any]
    limit_images: float


def each(function: Callable[[Any], Any], items: Sequence) -> Callable[[], None]:
    """A call of the function on each of the items."""
    def call() -> None:
        for item in items:
            function(item)
    return call


def file_stages(paths: list[Path], args: argparse.Namespace) -> list[Stage]:
    """Stages that read files; these lie alone in their folder."""
    tags = list(read_header(paths[0]))
    read_bare = partial(dcmread, stop_before_pixels=True, specific_tags=tags)
    images, shared = len(paths), len(paths) * args.workers  # workers share the files at best
    return [Stage(partial(read_headers, paths[0].parent), images, each(read_bare, paths), shared),
            Stage(partial(prepare, paths, args), images, each(plain_decode, paths), shared)]


def plain_decode(path: Path) -> None:
    """Decodes the JPEG stream in a file with Pillow alone."""
    content = path.read_bytes()
    try:
        Image.open(io.BytesIO(content[content.index(b"\xff\xd8\xff"):])).load()
    except (ValueError, OSError):
        raise cli.InputError(
            f"{path.resolve()} has no JPEG stream: give another folder with --data") from None


def network_stages(dataset: PneumoniaDataset, runtime: Runtime,
                   args: argparse.Namespace) -> list[Stage]:
    """Stages that run the network, or feed it, on whole batches with train.py's defaults."""
    train_args = train.parse_args([f"--rescale-factor={args.rescale_factor}"])
    loader = training_loader(dataset, range(len(dataset)), args.batch_size, runtime)
    training = train.build_training(train.build_model(train_args), loader, train_args, runtime)
    batches = [batch for batch, _ in loader]
    images = sum(map(len, batches))

    def load_and_augment() -> None:
        for batch, masks in loader:
            training.augmentation(runtime.load(batch), masks.to(runtime.device).float())

    predict = partial(runtime.predict_masks, deepcopy(training.model).eval())
    ready = runtime.load(batches[0])
    theta = torch.eye(2, 3, device=runtime.device).expand(len(ready), 2, 3)
    grid = F.affine_grid(theta, ready.shape, align_corners=True)

    def resample() -> None:
        for _ in batches:
            F.grid_sample(ready, grid, mode="bilinear", align_corners=True)
            F.grid_sample(ready, grid, mode="nearest", align_corners=True)

    side = MATRIX_SIDE[runtime.device.type]
    matrix = torch.randn(side, side, device=runtime.device, dtype=runtime.dtype)
    operations = 2 * side**3  # of a product
    trained = operations / count_operations(args.rescale_factor, training=True)
    predicted = operations / count_operations(args.rescale_factor, training=False)
    return [Stage(load_and_augment, images, resample, images),
            Stage(lambda: train_one_epoch(training, log=lambda *_: None), images,
                  lambda: matrix @ matrix, trained),
            Stage(each(predict, batches), images, lambda: matrix @ matrix, predicted)]


def count_operations(rescale_factor: int, *, training: bool) -> int:
    """Floating point operations per image, forward or forward and backward; nothing is computed."""
    side = cli.IMAGE_SIDE // rescale_factor
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = PneumoniaUNET.for_images(rescale_factor)(torch.zeros(1, 1, side, side))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def box_stages(cases: list[Overlay], folder: Path) -> list[Stage]:
    """Stages from masks to boxes, scores and pictures."""
    images, default = len(cases), metrics.Thresholds().alone()
    pictures = [draw_overlay(case) for case in cases[:DISTINCT]]

    def score(grid: metrics.Grid) -> metrics.Evaluation:
        scores = [metrics.score_mask(case.mask, case.original_size, case.truth, grid)
                  for case in cases]
        return metrics.Evaluation(0.0, grid, np.full(images, 0.5), np.ones(images, bool),
                                  np.full(images, ""), np.array(scores))

    def label(thresholds: Sequence[float]) -> None:
        for case, threshold in product(cases, thresholds):
            ndimage.label(case.mask > threshold, structure=np.ones((3, 3)))

    return [Stage(lambda: metrics.choose_thresholds(score, metrics.Thresholds()), images,
                  lambda: label(metrics.BOX_THRESHOLDS), images),
            Stage(lambda: score(default), images, lambda: label(default.boxes), images),
            Stage(each(partial(save_overlay, folder), cases), images,
                  each(encode_png, pictures), len(pictures))]


@contextmanager
def linked(files: Sequence[Path], count: int) -> Iterator[list[Path]]:
    """A temporary folder of `count` links to the files, repeated as often as it takes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number:06d}.dcm") for number in range(count)]
        for path, file in zip(paths, cycle(files)):
            path.symlink_to(file.resolve())
        yield paths


def prepare(paths: Sequence[Path], args: argparse.Namespace) -> PneumoniaDataset:
    """The data set of the files, each with a random box of the challenge's sizes in both lungs."""
    rng, files = np.random.default_rng(42), {path.stem: path for path in paths}
    low, high = [0, 100, 124, 121], [100, 400, 317, 598]
    corners = np.array([[100, 0, 0, 0], [550, 0, 0, 0]])  # in pixels of the original image
    boxes = {patient_id: corners + rng.uniform(low, high, (2, 4)) for patient_id in files}
    return PneumoniaDataset(files, Labels(boxes, dict.fromkeys(files, "")), workers=args.workers,
                            side=cli.IMAGE_SIDE // args.rescale_factor)


def draw_case(dataset: PneumoniaDataset, index: int, rng: np.random.Generator) -> Overlay:
    """What the network might make of an image: its true mask, blurred, on low, uneven ground."""
    side, (_, masks) = dataset.side, dataset[[index]]
    blurred = ndimage.gaussian_filter(masks[0, 0].numpy().astype(float), side / 12)
    uneven = ndimage.zoom(rng.uniform(0.7, 1, (16, 16)), side / 16, order=1)
    mask = uneven * (0.03 + rng.uniform(0.2, 1) * blurred)
    radiograph = read_radiograph(dataset.paths[index], side, IMAGE_SIZE)
    return make_overlay(dataset.patient_ids[index], radiograph, mask.astype(np.float32),
                        metrics.Thresholds(gate=0), dataset.boxes[index])


def measure(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median of the seconds that a call takes."""
    def call_and_wait() -> None:
        call()
        torch.get_device_module(device).synchronize()
    return float(np.median(timeit.repeat(call_and_wait, number=1, repeat=repeats)))


def build_stages(paths: list[Path], runtime: Runtime, args: argparse.Namespace) -> list[Stage]:
    """All stages, in the order of STAGES."""
    dataset, rng = prepare(paths, args), np.random.default_rng(42)
    drawn = [draw_case(dataset, index, rng) for index in range(min(DISTINCT, len(dataset)))]
    cases = list(islice(cycle(drawn), len(dataset)))
    return [*file_stages(paths, args), *network_stages(dataset, runtime, args),
            *box_stages(cases, paths[0].parent / "pictures")]


def time_stages(stages: list[Stage], repeats: int, device: torch.device) -> dict[str, dict]:
    """Prints and returns the seconds per image of each stage and of its limit."""
    images, table = stages[0].images, {}
    print(f"\n{images} images\n{'stage':<17}{'ms/image':>12}{'limit':>12}{'ratio':>7}  limit is")
    for (name, meaning), stage in zip(STAGES.items(), stages):
        seconds = measure(stage.work, repeats, device) / stage.images
        limit = measure(stage.limit, repeats, device) / stage.limit_images
        print(f"{name:<17}{1000 * seconds:>12.3f}{1000 * limit:>12.3f}{seconds / limit:>7.2f}  "
              f"{meaning}")
        table[name] = {"seconds": seconds, "limit": limit}
    sample, step = table["training sample"]["seconds"], table["training step"]["seconds"]
    peak = table["training step"]["limit"] / step
    # at most, because a GPU may still compute while the next batch is made
    print(f"training: {1 / step:.4g} images/s, {peak:.0%} of the matrix peak; the device waits for "
          f"data {sample / step:.2%} of the time at most")
    return {"images": images, "stages": table}


def peak_memory() -> int:
    """The most bytes of memory that this process has held; Linux alone tells."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure_cache(paths: list[Path], args: argparse.Namespace) -> dict[str, int]:
    """Prints and returns by how much a data set, prepared and read in batches, raises the peak."""
    before = peak_memory()
    dataset = prepare(paths, args)
    for batch in torch.randperm(len(dataset)).split(args.batch_size):
        dataset[batch.tolist()]
    grown = peak_memory() - before
    size = len(dataset) * dataset.side**2
    print(f"{len(dataset)} images ({size / 1e9:.2f} GB) prepared and read in batches: peak memory "
          f"grew by {grown / 1e6:.0f} MB")
    return {"images": len(dataset), "peak": grown}


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--data", "-d", kind="folder", help="folder of DICOM files",
                    variable="TRAINML_DATA_PATH", part=image_folder(),
                    written_by="python sample_data.py")
    add, number = parser.add_argument, cli.bounded(1, math.inf, int)
    add("--images", type=number, nargs="+", default=[250],
        help="number of images, a table for each; files are repeated as needed (default: 250)")
    add("--cache", type=number,
        help="first measure the memory that this many prepared images take")
    add("--repeats", type=number, default=3,
        help="times that a stage is measured; the median counts (default: %(default)s)")
    add("--json", help="file to write the figures to")
    parser.add_runtime_options(batch_size=8, rescale_factor=4)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.check_paths(args)
    if args.json:
        cli.output_folder(Path(args.json).parent, flag="--json")
    files = list(find_dicom_files(Path(args.data))[0].values())
    cli.refuse_if(not files, f"no file in {args.data}: give the folder of the images with --data")
    runtime = choose_runtime(args.device, args.precision)
    is_gpu = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_gpu else "cpu"
    print(f"{device}, {runtime.dtype}, {cli.usable_cores()} cores, {args.workers} workers, batches "
          f"of {args.batch_size}, {cli.IMAGE_SIDE // args.rescale_factor} pixels, median of "
          f"{args.repeats}; {len(files)} files in {args.data}")
    figures = {"device": device, "cores": cli.usable_cores(), "dtype": str(runtime.dtype),
               "torch": torch.__version__, "arguments": vars(args), "tables": []}
    if args.cache:
        with linked(files, args.cache) as paths:
            figures["cache_bytes"] = measure_cache(paths, args)
    for count in args.images:
        with linked(files, count) as paths:
            stages = build_stages(paths, runtime, args)
            figures["tables"].append(time_stages(stages, args.repeats, runtime.device))
    figures["peak_bytes"] = peak_memory()
    figures["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()  # 0 without a GPU
    print(f"\npeak memory {figures['peak_bytes'] / 1e9:.2f} GB, "
          f"on the GPU {figures['peak_cuda_bytes'] / 1e9:.2f} GB")
    if args.json:
        cli.write_text(Path(args.json), json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
