"""Times every stage of the pipeline next to the least that the machine at hand could need for it.

    python benchmark.py                             # the images of sample_data.py, a few minutes without a GPU
    python benchmark.py --images 1000 --growth      # the same at 1, 2 and 4 times as many images
    python benchmark.py --images 50 --cache 26684   # and the memory of a full-size training set

Reads a folder of DICOM files with JPEG streams, repeated where --images asks for more; boxes and masks are drawn at
random. Prints a table of medians and writes it to --json. Times are wall-clock, those of `training sample` CPU time.
"""

import argparse
import io
import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom import dcmread
from scipy import ndimage
from torch.utils.flop_counter import FlopCounterMode

import cli
import train
from cli import IMAGE_SIDE, InputError, batched
from data_processing import read_headers
from dataset import Augmentation, PneumoniaDataset
from dicom import TAGS, find_dicom_files
from drawing import draw_overlay, save_overlay
from metrics import (
    BOX_THRESHOLDS,
    Evaluation,
    Thresholds,
    choose_thresholds,
    rescale_boxes,
    score_mask,
)
from model import PneumoniaUNET, Runtime, choose_runtime
from predict import make_overlay

CPU_BATCHES, GPU_BATCHES = 1, 32  # that the network runs: so many on a CPU, at least so many on a GPU
MATRIX_SIDE, PRODUCTS = {"cpu": 2048, "mps": 4096, "cuda": 8192}, 4  # of the matrix product that gives the peak
DISTINCT = 64  # masks drawn; more images repeat them
CHUNK = 8  # files handed to a worker at a time


class Bench(NamedTuple):
    """One data set and all that the stages need to work on it."""
    paths: list  # of links, alone in their folder
    dataset: PneumoniaDataset
    cases: list  # Overlay of each image
    indices: list  # of the images that the network works on, whole batches
    model: PneumoniaUNET
    runtime: Runtime
    pool: ProcessPoolExecutor
    options: argparse.Namespace  # train.py's arguments
    repeats: int
    notes: list  # lines to print below the table

    def measure(self, call, images, clock=time.perf_counter):
        """Seconds per image: the median of `repeats` calls that work on so many images."""
        times = []
        for _ in range(self.repeats):
            started = clock()
            call()
            if self.runtime.device.type != "cpu":
                getattr(torch, self.runtime.device.type).synchronize()
            times.append(clock() - started)
        return float(np.median(times)) / images

    def measure_files(self, function):
        """Seconds per image of a function that takes one path, on all workers."""
        return self.measure(lambda: list(self.pool.map(function, self.paths, chunksize=CHUNK)), len(self.paths))


class DataClock:
    """Loader and augmentation of train_one_epoch in one, which notes how long the device waits for each batch.

    A wait lasts from the end of a step to the end of the next batch's augmentation. A GPU's are read off its own clock:
    it may still compute while Python fetches data, and then it does not wait.
    """

    def __init__(self, loader, device):
        self.loader, self.augmentation, self.on_cuda = loader, Augmentation(None), device.type == "cuda"

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.asked, self.ready = [self._now()], []
        for batch in self.loader:
            yield batch
            self.asked.append(self._now())

    def __call__(self, images, masks):
        augmented = self.augmentation(images, masks)
        self.ready.append(self._now())
        return augmented

    def _now(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited(self):
        """Seconds of the last epoch."""
        pairs = zip(self.asked, self.ready)
        return sum(asked.elapsed_time(ready) / 1000 if self.on_cuda else ready - asked for asked, ready in pairs)


def time_header_table(bench):
    seconds = bench.measure(lambda: read_headers(bench.paths[0].parent), len(bench.paths))
    return seconds, bench.measure_files(bare_header)


def bare_header(path):
    dcmread(path, stop_before_pixels=True, specific_tags=TAGS)


def time_prepare(bench):
    seconds = bench.measure(lambda: prepare(bench.paths, bench.options), len(bench.paths))
    return seconds, bench.measure_files(plain_decode)


def plain_decode(path):
    content = path.read_bytes()
    try:
        Image.open(io.BytesIO(content[content.index(b"\xff\xd8\xff"):])).load()
    except (ValueError, OSError):
        raise InputError(f"{path.resolve()} has no JPEG stream: give another folder with --data") from None


def time_training_sample(bench):
    device, threads = bench.runtime.device, torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time is measured, and a thread that waits for another would use some
    loader = train.build_loader(bench.dataset, range(len(bench.dataset)), bench.options, bench.runtime)[0]
    augmentation = Augmentation(None)

    def epoch():
        for images, masks in loader:
            augmentation(bench.runtime.load(images), masks.to(device).float())

    images, masks = next(iter(loader))
    images, masks = bench.runtime.load(images), masks.to(device).float()
    grid = F.affine_grid(torch.eye(2, 3, device=device).repeat(len(images), 1, 1), images.shape, align_corners=True)

    def resample():
        for _ in loader.sampler:
            F.grid_sample(images, grid, align_corners=True)
            F.grid_sample(masks, grid, mode="nearest", align_corners=True)

    count = len(loader) * len(images)
    seconds, limit = (bench.measure(call, count, time.process_time) for call in (epoch, resample))
    torch.set_num_threads(threads)
    return seconds, limit


def time_training(bench):
    runtime, images, waits = bench.runtime, len(bench.indices), []
    loader, _ = train.build_loader(bench.dataset, bench.indices, bench.options, runtime)
    clock = DataClock(loader, runtime.device)
    training = train.build_training(bench.model, bench.options, 100 * len(clock), runtime)._replace(augmentation=clock)

    def epoch():
        train.train_one_epoch(training, clock, lambda losses, learning_rate: None)
        waits.append(clock.waited())

    epoch()  # the first one chooses kernels and fetches memory
    seconds = bench.measure(epoch, images)
    limit = network_limit(bench, training=True)
    bench.notes.append(f"training: {1 / seconds:.4g} images/s, {limit / seconds:.0%} of the matrix peak, the device "
                       f"waits for data {np.median(waits[1:]) / images / seconds:.2%} of the epoch")
    return seconds, limit


def time_inference(bench):
    batches = list(batched(bench.indices, bench.options.batch_size))
    bench.model.eval()
    seconds = bench.measure(lambda: [bench.runtime.predict_masks(bench.model, bench.dataset[part][0])
                                     for part in batches], len(bench.indices))
    return seconds, network_limit(bench, training=False)


def network_limit(bench, *, training):
    """Seconds per image of the network's operations at the rate of a large matrix product in the same precision."""
    device, dtype = bench.runtime
    side = MATRIX_SIDE[device.type]
    first, second = torch.randn(2, PRODUCTS, side, side, device=device, dtype=dtype)
    rate = 2 * side**3 / bench.measure(lambda: first @ second, PRODUCTS)
    bench.notes.append(f"matrix peak in {'training' if training else 'inference'}: {rate / 1e12:.3g} TFLOP/s")
    return count_operations(bench.options, training) / rate


def count_operations(options, training):
    """Floating point operations per image, forward or forward and backward; nothing is computed."""
    side = IMAGE_SIDE // options.rescale_factor
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = train.build_model(options)(torch.zeros(1, 1, side, side))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def time_threshold_search(bench):
    images = len(bench.cases)

    def evaluate(box_thresholds):
        scores = np.array([score(case, box_thresholds) for case in bench.cases])
        return Evaluation(0.0, np.full(images, 0.5), np.ones(images, bool), np.full(images, ""), scores)
    seconds = bench.measure(lambda: choose_thresholds(evaluate, Thresholds()), images)
    return seconds, label_limit(bench, BOX_THRESHOLDS)


def time_scoring(bench):
    box_thresholds = [Thresholds().box]
    seconds = bench.measure(lambda: [score(case, box_thresholds) for case in bench.cases], len(bench.cases))
    return seconds, label_limit(bench, box_thresholds)


def score(case, box_thresholds):
    return score_mask(case.mask, case.original_size, case.truth, box_thresholds)


def label_limit(bench, thresholds):
    masks, neighbours = [case.mask for case in bench.cases[:DISTINCT]], np.ones((3, 3))
    return bench.measure(lambda: [ndimage.label(mask > threshold, structure=neighbours)
                                  for mask in masks for threshold in thresholds], len(masks))


def time_overlay(bench):
    canvases = [draw_overlay(case) for case in bench.cases[:DISTINCT]]
    with tempfile.TemporaryDirectory() as folder:
        seconds = bench.measure(lambda: [save_overlay(Path(folder), str(place % DISTINCT), case)
                                         for place, case in enumerate(bench.cases)], len(bench.cases))
    return seconds, bench.measure(
        lambda: [canvas.save(io.BytesIO(), format="PNG", compress_level=1) for canvas in canvases], len(canvases))


STAGES = {  # what is timed (it returns seconds per image and their limit), and what the limit is
    "header table": (time_header_table, "bare header reads on all workers"),
    "prepare": (time_prepare, "plain Pillow decode of the JPEG streams on all workers"),
    "training sample": (time_training_sample, "resampling image and mask on a ready grid; CPU time"),
    "training step": (time_training, "the network's operations at the rate of a matrix product"),
    "inference": (time_inference, "the network's operations at the rate of a matrix product"),
    "threshold search": (time_threshold_search, "labelling the mask once for each threshold"),
    "scoring": (time_scoring, "labelling the mask once"),
    "overlay PNG": (time_overlay, "encoding the PNG alone"),
}


def prepare(paths, options):
    """PneumoniaDataset of the files, with two random boxes each."""
    files, rng = {path.stem: path for path in paths}, np.random.default_rng(42)
    boxes = {patient_id: [draw_box(rng, left) for left in (100, 550)] for patient_id in files}
    return PneumoniaDataset(files, boxes, rescale_factor=options.rescale_factor,
                            workers=options.workers)


def draw_box(rng, left):
    """A box of the challenge's sizes, about the middle 90 %, in pixels of the original image."""
    return [left + rng.uniform(0, 100), rng.uniform(100, 400), rng.uniform(124, 317), rng.uniform(121, 598)]


def draw_case(dataset, index, rng):
    """What the network might make of an image: a smooth bump for each box on a low, uneven ground."""
    size, side = dataset.original_sizes[index], dataset.side
    place, mask = np.arange(side) + 0.5, np.zeros((side, side))
    for x, y, width, height in rescale_boxes(dataset.boxes[index], size, (side, side)):
        across, down = (place - x - width / 2) / width, (place - y - height / 2) / height
        mask += rng.uniform(0.2, 0.95) * np.exp(-4 * down**2)[:, None] * np.exp(-4 * across**2)
    uneven = ndimage.zoom(rng.uniform(0.7, 1, (16, 16)), side / 16, order=1)
    mask = ((0.03 + 0.97 * np.clip(mask, 0, 1)) * uneven).astype(np.float32)
    return make_overlay(dataset.images[index].copy(), mask, size, Thresholds(gate=0), dataset.boxes[index])


def link_files(files, folder, count):
    """Fills `folder` with `count` links to the files, each as often as it takes, and returns their paths."""
    paths = [Path(folder, f"{number:06d}.dcm") for number in range(count)]
    for path, file in zip(paths, cycle(files)):
        path.symlink_to(file.resolve())
    return paths


def build_bench(paths, runtime, pool, args):
    dataset, rng = prepare(paths, args), np.random.default_rng(42)
    drawn = [draw_case(dataset, index, rng) for index in range(min(DISTINCT, len(dataset)))]
    batches = CPU_BATCHES if runtime.device.type == "cpu" else max(GPU_BATCHES, len(dataset) // args.batch_size)
    options = train.make_parser().parse_args([])
    vars(options).update({key: getattr(args, key) for key in ("batch_size", "rescale_factor", "workers", "device")})
    return Bench(paths=paths, dataset=dataset, cases=list(islice(cycle(drawn), len(dataset))),
                 indices=list(islice(cycle(range(len(dataset))), batches * args.batch_size)),
                 model=train.build_model(options).to(runtime.device, memory_format=torch.channels_last),
                 runtime=runtime, pool=pool, options=options, repeats=args.repeats, notes=[])


def time_stages(files, count, runtime, args):
    """Prints the table of `count` images; returns it: {stage: {"seconds", "limit"}}, both per image, and the notes."""
    print(f"\n{count} images\n{'stage':<17}{'ms/image':>12}{'limit':>12}{'ratio':>7}  limit is")
    table = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.workers) as pool:
        bench = build_bench(link_files(files, folder, count), runtime, pool, args)
        for name, (stage, meaning) in STAGES.items():
            seconds, limit = stage(bench)
            print(f"{name:<17}{1000 * seconds:>12.3f}{1000 * limit:>12.3f}{seconds / limit:>7.2f}  {meaning}")
            table[name] = {"seconds": seconds, "limit": limit}
    print(*bench.notes, sep="\n")
    return {"images": count, "stages": table, "notes": bench.notes}


def print_growth(tables):
    """How much each stage's cost grows when the images double: 2 if it is in proportion."""
    print("\ncost when the images double")
    for name in STAGES:
        seconds = [table["stages"][name]["seconds"] for table in tables]
        print(f"{name:<17}" + "".join(f"{2 * after / before:>7.2f}" for before, after in zip(seconds, seconds[1:])))


def memory(key):
    """Resident memory of this process in bytes: VmRSS as it is, VmHWM the most that it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure_cache(files, args):
    """Prints and returns the memory in bytes that a data set of args.cache images takes, read in batches."""
    before = memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare(link_files(files, folder, args.cache), args)
    for indices in batched(torch.randperm(len(dataset)).tolist(), args.batch_size):
        dataset[indices]
    grown = {"images": len(dataset), "now": memory("VmRSS") - before, "peak": memory("VmHWM") - before}
    print(f"{len(dataset)} images ({dataset.images.nbytes / 1e9:.2f} GB) prepared and read in batches: resident memory "
          f"grew by {grown['now'] / 1e6:.0f} MB, {grown['peak'] / 1e6:.0f} MB at the peak")
    return grown


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", "-d", default=cli.default_path("TRAINML_DATA_PATH", "stage_2_train_images"), help="folder of DICOM files")
    add("--images", type=cli.bounded(1, math.inf, int), default=250, help="how many; files repeat if they are fewer")
    add("--growth", default=False, action=argparse.BooleanOptionalAction, help="measure at 1, 2 and 4 times --images")
    add("--cache", type=cli.bounded(1, math.inf, int), help="first measure the memory that so many prepared images take")
    add("--repeats", type=cli.bounded(1, math.inf, int), default=3, help="of each measurement; the median counts")
    add("--json", help="file for the figures")
    cli.add_runtime_options(parser, batch_size=16 if torch.cuda.is_available() else 8, rescale_factor=4)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    runtime = choose_runtime(args.device, args.precision)
    folder = cli.require(
        args.data, "folder", flag="--data (python sample_data.py makes one)", variable="TRAINML_DATA_PATH")
    files = list(find_dicom_files(folder)[0].values())
    if not files:
        raise InputError(f"no file in {folder}: give the folder that holds the images with --data")
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else runtime.device.type
    print(f"{device}, {runtime.dtype}, {cli.usable_cores()} cores, {args.workers} workers, batches of {args.batch_size}, "
          f"{IMAGE_SIDE // args.rescale_factor} pixels, median of {args.repeats}; {len(files)} files in {folder}")

    figures = {"device": device, "cores": cli.usable_cores(), "dtype": str(runtime.dtype), "arguments": vars(args),
               "versions": train.versions(), "cache_bytes": measure_cache(files, args) if args.cache else None}
    figures["tables"] = [time_stages(files, args.images * factor, runtime, args)
                         for factor in ((1, 2, 4) if args.growth else (1,))]
    if args.growth:
        print_growth(figures["tables"])
    figures["peak_bytes"] = memory("VmHWM")
    figures["peak_cuda_bytes"] = torch.cuda.max_memory_allocated() if runtime.device.type == "cuda" else 0
    print(f"\npeak memory {figures['peak_bytes'] / 1e9:.2f} GB, on the GPU {figures['peak_cuda_bytes'] / 1e9:.2f} GB")
    if args.json:
        cli.write_text(args.json, json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
