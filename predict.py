"""Finds lung opacities in radiographs with a trained model.

    python predict.py -d data/stage_2_test_images --model output/final.pth.tar --output output/new
    python predict.py -d scan.dcm photo.jpg    # with the weights of this repository

Reads DICOM files and PNG, JPEG and TIFF images. Writes to --output: report.html, annotations.json,
submission.csv, images/<patientId>.png, with --dicom dicom/<patientId>.sr.dcm and .sc.dcm, and where
a file could not be read, skipped.csv. In the folder that train.py saves to by default, the page is
predictions.html. A run that ends early writes what is done, and the same command goes on with it.
Under torchrun on several machines, the page shows the pictures of all if they share the folder.
"""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
import parallel
from data_processing import (
    Labels,
    files_of_table,
    read_labels,
    read_split,
    refuse_mixture,
)
from metrics import Thresholds
from model import Runtime, load_checkpoint
from radiographs import Reading, find_radiographs, read_images
from results import (
    IMAGE_SIZE,
    Predictions,
    dicom_writer,
    picture_writer,
    refuse_to_replace,
    result_paths,
    stamp_of,
)


def find_files(
        data: Sequence[str], output: Path,
) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """What find_radiographs finds in folders and files, without the results of a run in `output`.

    Raises InputError if there are no files at all, and as refuse_mixture does.
    """
    sources = [Path(path) for path in data]
    leave_out = [path for source in sources for path in result_paths(output, source)]
    files, skipped = find_radiographs(sources, leave_out)
    cli.refuse_if(not files and not skipped,
                  f"no files in {', '.join(data)}: give another with --data")
    for source in sources:
        refuse_mixture(source, [path for path in files.values() if source in path.parents])
    return files, skipped


def predict_masks(model: torch.nn.Module, readings: Iterable[tuple[str, Reading]],
                  runtime: Runtime, *, batch_size: int,
                  ) -> Iterator[tuple[str, Reading, np.ndarray | None]]:
    """Yields (patient_id, Reading, mask) for each (patient_id, Reading); the mask (S, S) of an
    unreadable file is None."""
    for batch in cli.batched(readings, batch_size):
        images = {key: reading.value.image[None] for key, reading in batch if reading.value}
        masks = {}
        if images:
            stacked = torch.from_numpy(np.stack(list(images.values())))
            masks = dict(zip(images, runtime.predict_masks(model, stacked)))
        for patient_id, reading in batch:
            yield patient_id, reading, masks.get(patient_id)


def thresholds_in_use(checkpoint: dict[str, Any], box: float | None,
                      gate: float | None) -> Thresholds:
    """The thresholds of a checkpoint, with `box` and `gate` in their place if given."""
    thresholds = Thresholds.of_checkpoint(checkpoint)
    given = {name: value for name, value in (("box", box), ("gate", gate)) if value is not None}
    if given:
        thresholds = thresholds._replace(**given, source=f"{' and '.join(given)} given by flag")
    return thresholds


def find_trained_on(model: str) -> set[str]:
    """Ids of the images that a checkpoint was trained on, if its run's split.csv lies beside it."""
    path = Path(model).with_name("split.csv")
    parts = read_split(path) if path.exists() else {}
    return {patient_id for patient_id, part in parts.items() if part == "training"}


def describe_run(args: argparse.Namespace, runtime: Runtime, rescale_factor: int,
                 thresholds: Thresholds) -> dict[str, Any]:
    """What the results depend on apart from the radiographs, as plain values."""
    return {"model": [cli.name_model(args.model), stamp_of(args.model)],
            "labels": args.labels and [args.labels, stamp_of(args.labels)],
            "thresholds": thresholds, "rescale_factor": rescale_factor,
            "image_size": args.image_size if args.save_images or args.dicom else None,
            "save_images": args.save_images, "dicom": args.dicom,
            "device": f"{runtime.device.type}, {runtime.dtype}"}


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_path("--data", "-d", kind="data", variable="TRAINML_DATA_PATH", nargs="+",
                    help="folders or files, DICOM, PNG, JPEG or TIFF")
    parser.add_path("--model", kind="file", variable="TRAINML_MODEL_PATH",
                    default=cli.default_model(), help="checkpoint of the network")
    has_folder = os.environ.get("TRAINML_OUTPUT_PATH")  # otherwise train.py saves to output
    parser.add_path("--output", kind="output", variable="TRAINML_OUTPUT_PATH",
                    part="" if has_folder else "predictions", help="folder for the results")
    parser.add_path("--labels", kind="file",
                    help="train.csv or label table of these images: adds scores and true boxes")
    parser.add_to_files("--save-images", action=argparse.BooleanOptionalAction,
                        help="write annotated PNG images (default: on)")
    parser.add_to_files("--dicom", action=argparse.BooleanOptionalAction,
                        help="write a structured report and a secondary capture of each DICOM "
                             "image (default: off)")
    add = parser.add_argument_group("what is marked and drawn").add_argument
    add("--box-threshold", "--bt", type=cli.bounded(0, 1),
        help="mask probability above which a pixel belongs to a box (default: the checkpoint's)")
    add("--gate-threshold", "--gt", type=cli.bounded(0, 1),
        help="highest probability below which a region is left out (default: the checkpoint's)")
    add("--image-size", type=cli.bounded(64, 8192, int), default=IMAGE_SIZE,
        help="longest side of the annotated images in pixels (default: %(default)s)")
    parser.add_runtime_options(batch_size=16, rescale_factor=None)
    parser.set_defaults(save_images=True, dicom=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.check_paths(args)
    runtime = parallel.join(args.device, args.precision)

    # network, thresholds and truth
    model, checkpoint = load_checkpoint(Path(args.model), runtime.device)
    rescale_factor = args.rescale_factor or checkpoint.get("rescale_factor") or 4
    model.check_side(rescale_factor)
    thresholds = thresholds_in_use(checkpoint, args.box_threshold, args.gate_threshold)
    labels = read_labels(args.labels) if args.labels else Labels({})

    # files
    output = Path(args.output)
    files, left_out = parallel.once(partial(find_files, args.data, output), runtime)
    if args.labels:
        files = files_of_table(files, Path(args.labels), labels.boxes.keys())
    settings = describe_run(args, runtime, rescale_factor, thresholds)
    source = args.data[0] if len(args.data) == 1 else f"the {len(args.data)} paths given"
    print(f"files in {source}: {len(files)}", settings["device"], settings["model"][0], thresholds,
          sep="; ")
    pictures = output / "images" if args.save_images else None
    refuse_to_replace(files, pictures)

    # masks, boxes and pictures of this process's share of the files
    with Predictions(output, (files, left_out), runtime, settings=settings, thresholds=thresholds,
                     labels=labels, trained_on=find_trained_on(args.model)) as predictions:
        batches = list(cli.batched(predictions.left, args.batch_size))
        share = {key: files[key] for batch in parallel.share(batches, runtime) for key in batch}
        images = read_images(share.values(), side=cli.IMAGE_SIDE // rescale_factor,
                             workers=max(args.workers // parallel.find_launch().local_world, 1),
                             display_size=settings["image_size"])
        objects = dicom_writer(output / "dicom", files, Path(args.model)) if args.dicom else None
        with picture_writer(pictures, objects and objects.write) as write_picture, \
                images as readings:
            masks = predict_masks(model, zip(share, readings), runtime, batch_size=args.batch_size)
            for result in cli.progress(masks, total=len(share), description="predict"):
                overlay = predictions.add(*result)
                if overlay:
                    write_picture(overlay)
        if objects:
            refused = parallel.gather(objects.refused, runtime)
            cli.warn("images get no DICOM objects", sorted(refused))
        return predictions.finish()


if __name__ == "__main__":
    parallel.run(main)
