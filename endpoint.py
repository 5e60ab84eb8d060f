"""Finds lung opacities in one radiograph at a time, for an endpoint job or as a web server.

    MODEL_CHECKPOINT=output/final.pth.tar python endpoint.py    # or without: the shipped weights

Serves POST /predict, GET /health and, at /, a page to drop files on. Writes no file.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch

import cli
from metrics import Thresholds, prediction_string
from model import choose_runtime, load_checkpoint
from radiographs import (
    Radiograph,
    ReaderPool,
    UnreadableImage,
    patient_id_of,
    read_radiograph,
)
from results import IMAGE_SIZE, draw_overlay, encode_png, make_overlay

MAX_BODY = 48 * 2**20  # bytes; 4280 x 3520 pixels of 16 bits take 40 MB as base64
MAX_REQUESTS = 16  # at once, waiting ones included
UPLOAD_SECONDS = 60  # within which a body must arrive
READERS = 4
JSON, FORM = "application/json", "multipart/form-data"

_loading = Lock()  # the cache of load_network alone would let two threads load it


def get_prediction(pId: str, dicom: str) -> dict[str, dict[str, str]]:
    """Answers one file, given as base64 text, in the form of trainML's endpoints:
    {pId: {"annotations": "confidence x y width height ...", "image": base64 of a PNG,
    "remarks": what was ignored or is in doubt, empty if nothing}}.

    Boxes are in original pixels. Raises ValueError with the reason if the file cannot be read, and
    cli.Failure if this code or the network is at fault.
    """
    with _loading:
        network = load_network()
    return network.predict(JSON, json.dumps({"pId": pId, "dicom": dicom}).encode())


@cache
def load_network() -> "Network":
    """The network of $MODEL_CHECKPOINT or else of cli.default_model, loaded once."""
    return Network(cli.require(os.environ.get("MODEL_CHECKPOINT") or cli.default_model(), "file",
                               flag="MODEL_CHECKPOINT", variable="TRAINML_MODEL_PATH"))


class Network:
    """A trained network, and readers that parse requests for it; any thread may use it."""

    def __init__(self, checkpoint: Path):
        self.readers = ReaderPool(read_request, READERS)  # forked before PyTorch starts threads
        self.runtime = choose_runtime("auto", "auto")
        self.name = cli.name_model(checkpoint)
        self.model, state = load_checkpoint(checkpoint, self.runtime.device)
        self.side = cli.IMAGE_SIDE // (state.get("rescale_factor") or 4)
        self.thresholds = Thresholds.of_checkpoint(state)
        self.lock = Lock()  # one image at a time

    def predict(self, content_type: str, body: bytes) -> dict[str, dict[str, str]]:
        """The answer to a request, as get_prediction gives it."""
        reading = self.readers.read((content_type, body, self.side))
        if reading.internal_error:  # the last line of the trace may hold values of the file
            print(reading.trace.rstrip().rpartition("\n")[0], file=sys.stderr)
            raise cli.InternalError(reading.problem)
        if reading.problem:
            raise ValueError(reading.problem)
        patient_id, radiograph = reading.value
        image = torch.from_numpy(radiograph.image[None, None])
        with self.lock:
            [mask] = self.runtime.predict_masks(self.model, image)
        if not np.isfinite(mask).all():
            raise cli.Failure(f"has no result, since {self.name} gives values that are not "
                              f"finite in {self.runtime.dtype}: give the endpoint another "
                              "checkpoint, or try predict.py --precision fp32")
        overlay = make_overlay(patient_id, radiograph, mask, self.thresholds)
        overlay = overlay._replace(model=self.name)
        picture = base64.b64encode(encode_png(draw_overlay(overlay))).decode()
        annotations = prediction_string(overlay.boxes, overlay.confidences)
        answer = {"annotations": annotations, "image": picture, "remarks": reading.note}
        return {patient_id: answer}


# Parsing, in a reader: anybody may send anything


def read_request(request: tuple[str, bytes, int]) -> tuple[str, Radiograph]:
    """The id and the radiograph in a request (content type, body, side of the network's image).
    Raises UnreadableImage with the reason."""
    content_type, body, side = request
    is_json = content_type.lower().startswith(JSON)
    try:
        patient_id, file = _read_json(body) if is_json else _read_form(content_type, body)
    except (ValueError, TypeError, AttributeError, AssertionError, RecursionError):
        expected = '{"pId": "...", "dicom": "base64 text"}' if is_json else "a form with one file"
        raise UnreadableImage(f"is not {expected}") from None
    if not patient_id.isprintable() or not re.fullmatch(r"(?![ .])[^<>/\\]{1,128}", patient_id):
        raise UnreadableImage("has an id that is not 1 to 128 plain characters without <>/\\")
    return patient_id, read_radiograph(io.BytesIO(file), side, IMAGE_SIZE)


def _read_json(body):
    # sorted pairs, since a dictionary would hide a key that is given twice
    [(first, text), (second, patient_id)] = json.loads(body, object_pairs_hook=sorted)
    if (first, second) != ("dicom", "pId") or not isinstance(patient_id, str):
        raise ValueError
    text = re.sub("^data:[^,]*,", "", "".join(text.split()))  # in lines, or as browsers read files
    text = text.replace("-", "+").replace("_", "/")  # the form for addresses, which may lack "="
    return patient_id, base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _read_form(content_type, body):
    from python_multipart import create_form_parser
    files, in_memory = [], {"MAX_MEMORY_FILE_SIZE": MAX_BODY, "UPLOAD_ERROR_ON_BAD_CTE": True}
    parser = create_form_parser({"Content-Type": content_type}, None, files.append, in_memory)
    parser.write(body)
    parser.finalize()
    [file] = files
    name = file.file_name.decode().replace("%22", '"')  # browsers write quotation marks so
    return name if "/" in name else patient_id_of(Path(name)), file.file_object.getvalue()


# The server


def build_app() -> "FastAPI":  # noqa: F821, imported inside
    """POST /predict, GET /health and the page; refusals are {"detail": reason}, 4xx or 5xx."""
    from fastapi import FastAPI, HTTPException, Request, responses
    from starlette.requests import ClientDisconnect
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    slots = asyncio.Semaphore(MAX_REQUESTS)

    async def receive(request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"is larger than {MAX_BODY:,} bytes")
        return bytes(body)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> responses.FileResponse:
        return responses.FileResponse(Path(__file__).with_name("endpoint.html"))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": cli.VERSION, "model": load_network().name}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, dict[str, str]]:
        content_type = request.headers.get("Content-Type", "")
        if not content_type.lower().startswith((JSON, FORM)):
            raise HTTPException(415, f"is neither {JSON} nor {FORM}")
        if slots.locked():
            raise HTTPException(503, "came while the server was busy", {"Retry-After": "1"})
        async with slots:
            try:
                body = await asyncio.wait_for(receive(request), UPLOAD_SECONDS)
                network = load_network()
                return await asyncio.get_running_loop().run_in_executor(
                    network.readers.threads, network.predict, content_type, body)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"took more than {UPLOAD_SECONDS} seconds to arrive")
            except OSError:  # of a reader that cannot be started
                raise HTTPException(503, "came while no reader was free", {"Retry-After": "5"})
            except ClientDisconnect:
                raise HTTPException(400, "ended before its body was complete")
            except (ValueError, cli.Failure) as error:
                raise HTTPException(400 if isinstance(error, ValueError) else 500, str(error))
    return app


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=cli.bounded(0, 65535, int), default=8000,
                        help="0 takes any free one (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        import python_multipart  # noqa: F401, imported in the readers
        import uvicorn
        app = build_app()
    except ImportError as error:
        raise cli.InputError(f"{error.name} is missing: pip install -r requirements-extra.txt")
    is_ipv6 = ":" in args.host
    try:
        listener = socket.create_server((args.host, args.port),
                                        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    except OSError as error:
        raise cli.InputError(f"cannot listen: {error.strerror}: give another --host or --port")
    network = load_network()
    host = f"[{args.host}]" if is_ipv6 else args.host
    print(f"ready at http://{host}:{listener.getsockname()[1]}; {network.name}; "
          "not for clinical use")
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        network.readers.stop()


if __name__ == "__main__":
    cli.run(main)
