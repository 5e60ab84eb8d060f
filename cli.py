"""What the scripts share: paths from the TRAINML_* variables, flags, atomic writes, progress lines,
and user errors reported on one line."""

import argparse
import contextlib
import csv
import errno
import io
import math
import os
import re
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

VERSION = "2.0"  # the newest in CHANGELOG.md
FOLDERS = {"TRAINML_DATA_PATH": "data", "TRAINML_MODEL_PATH": ".", "TRAINML_OUTPUT_PATH": "output"}
# the challenge's layout; the truth of the test images and the marker are sample_data.py's
TRAIN_IMAGES, TEST_IMAGES = "stage_2_train_images", "stage_2_test_images"
LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
TEST_LABELS, MARKER = "stage_2_test_labels.csv", "synthetic.json"
SUBMISSION = "stage_2_sample_submission.csv"  # names the test images
SHIPPED = Path(__file__).with_name("weights") / "pneumonia.pth.tar"  # by tools/ship.py
IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
RESCALE_FACTORS = (1, 2, 4, 8, 16)
NAMED = 5  # items named in a warning; the rest are counted
LOG_SECONDS = 30  # between progress lines in a job log
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class Failure(Exception):
    """An error of which the user needs the message alone, not the traceback."""
    status = 1  # of the script that it ends


class InputError(Failure, ValueError):
    """Something the user gave cannot be used; the message has the found value and the remedy."""
    status = 2


class InternalError(Failure):
    """A fault of these scripts, its traceback already printed, left nothing to continue with."""


def refuse_if(wrong: object, message: str) -> None:
    """Raises InputError with the message if something given is wrong."""
    if wrong:
        raise InputError(message)


def default_path(variable: str, *parts: str) -> str:
    """Path below the folder that a TRAINML_* variable names, or below its local default."""
    return os.path.join(os.environ.get(variable) or FOLDERS[variable], *parts)


def default_model() -> str:
    """final.pth.tar in $TRAINML_MODEL_PATH or, if that is not set, here; if none lies here, the
    shipped model."""
    path = default_path("TRAINML_MODEL_PATH", "final.pth.tar")
    return path if os.environ.get("TRAINML_MODEL_PATH") or os.path.exists(path) else str(SHIPPED)


def name_model(path: str | Path) -> str:
    """What results call the model of a checkpoint."""
    return "the shipped model (docs/model-card.md)" if Path(path) == SHIPPED else str(path)


def require(path: str | Path, kind: str, *, flag: str, variable: str | None = None) -> Path:
    """Returns the Path of what a script reads: a "file", a "folder", or "data", which may be both.

    Raises InputError naming path, flag and variable if it is not there or of another kind.
    """
    path, remedy = _local_path(path, flag, variable)

    def refuse(wrong: bool, problem: str) -> None:
        refuse_if(wrong, f"{path} {problem}: give another with {remedy}")

    # Path.exists raises for a name too long, or no permission
    refuse(not os.path.exists(path), "does not exist")
    if kind == "file":
        refuse(path.is_dir(), "is a folder, not a file")
    elif not path.is_dir():
        refuse(not path.is_file(), "is neither a file nor a folder")  # a pipe is read only once
        refuse(zipfile.is_zipfile(path), "is a zip file, not the folder that it unpacks to")
        refuse(kind == "folder", "is a file, not the folder that it is in")
    return path


def output_folder(path: str | Path, *, flag: str, variable: str | None = None) -> Path:
    """Returns the Path of a folder to write to, which is made where it is missing.

    Raises InputError naming path, flag and variable if nothing can be written there.
    """
    path, remedy = _local_path(path, flag, variable)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise InputError(f"cannot write to {path} ({error.strerror}): give another folder with "
                         f"{remedy}") from None
    return path


def _local_path(path, flag, variable):
    """The Path, and in words how to give another; refuses an address such as gs://bucket."""
    remedy = f"{flag}, or set {variable}" if variable else flag
    refuse_if(re.match(r"\w+://", str(path)), f"{path} is an address, but only folders and files "
              "of this machine can be read and written: copy or mount it, and give its path with "
              f"{remedy}")
    return Path(path), remedy


class Parser(argparse.ArgumentParser):
    """argparse's parser whose errors are InputErrors: one line, without the usage before it."""

    def __init__(self, description: str):
        super().__init__(description=description)
        self.add_to_files = self.add_argument_group("files").add_argument
        self.path_checks = []  # (name, function that raises InputError)

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")

    def add_path(self, *names: str, kind: str, help: str, variable: str | None = None,
                 part: str = "", written_by: str = "", **options: Any) -> None:
        """A flag for a path: a `kind` of require, or "output", a folder to write to. Its default is
        `part` of the folder that a TRAINML_* variable names. With `nargs` it takes a list."""
        default = options.pop("default", None)
        if variable and not default:
            default = default_path(variable, *filter(None, [part]))
        shown = f" (default: {default.replace('%', '%%')})" if default else ""
        if default and "nargs" in options:
            default = [default]
        path = self.add_to_files(*names, default=default, help=help + shown, **options)
        flag = f"{names[0]} ({written_by} writes one)" if written_by else names[0]
        check = output_folder if kind == "output" else partial(require, kind=kind)
        self.path_checks.append((path.dest, partial(check, flag=flag, variable=variable)))

    def check_paths(self, args: argparse.Namespace) -> None:
        """Raises InputError for the first path that is not of its kind."""
        for name, check in self.path_checks:
            given = getattr(args, name)
            for path in given if isinstance(given, list) else [given]:
                if path is not None:
                    check(path)

    def add_runtime_options(self, *, batch_size: int, rescale_factor: int | None) -> None:
        """Flags on how a network runs; a `rescale_factor` of None means the checkpoint's."""
        add = self.add_argument_group("how the network runs").add_argument
        add("--rescale-factor", "--rf", type=int, choices=RESCALE_FACTORS, default=rescale_factor,
            help=f"{IMAGE_SIDE} / side of the network's image in pixels "
                 f"(default: {rescale_factor or 'that of the checkpoint'})")
        add("--batch-size", "--bs", type=bounded(1, math.inf, int), default=batch_size,
            help="images in a batch, 1 or more (default: %(default)s)")
        add("--device", default="auto", choices=["auto", "cuda", "cpu"],
            help="auto takes CUDA where it is available (default: %(default)s)")
        add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
            help="auto takes the fastest that the device computes natively (default: %(default)s)")
        add("--workers", type=bounded(1, math.inf, int), default=usable_cores(),
            help="processes that decode images (default: the cores of this job, %(default)s)")


def bounded(low: float, high: float, kind: type = float, *,
            above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number of type `kind` in low..high, or `above` low."""
    allowed = f"{low:g} or more" if math.isinf(high) else f"between {low:g} and {high:g}"
    if above:
        allowed = f"above {low:g}"

    def parse(text: str) -> float:
        value = kind(text)
        if value == math.inf or not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value
    parse.__name__ = "number"  # argparse: "invalid number value"
    return parse


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: a job or container often has fewer than the machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file; "max"
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


@contextlib.contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[io.BufferedWriter]:
    """Yields a binary file that replaces `path` if the block succeeds; otherwise the old file stays
    as it was. A `durable` file is on the disk then; any other is lost if the power fails soon."""
    temporary = Path(path).with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not name its file
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 atomically; undecodable bytes of file names are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """Writes rows as CSV, like write_text."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(path, table.getvalue())


def warn(what: str, items: Iterable) -> None:
    """Prints `what`, the number of `items` and the first few of them; nothing if there are none."""
    items = [str(item) for item in items]
    if items:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        print(f"warning: {what} ({len(items)}): {', '.join(items[:NAMED])}{more}")


def batched(iterable: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter (itertools.batched needs Python 3.12)."""
    iterator = iter(iterable)
    while batch := list(islice(iterator, size)):
        yield batch


def progress(iterable: Iterable, *, total: int, description: str, scale: int = 1) -> tqdm:
    """Shows a bar on a terminal, and in a job log a plain line every LOG_SECONDS. Each of the
    `total` steps counts as `scale` images; `set_postfix_str` of the result adds to the line."""
    options = {"total": total, "desc": description, "unit": " images", "leave": False,
               "unit_scale": scale if scale > 1 else False}
    if not sys.stderr.isatty():
        options |= {"file": _JobLog(), "mininterval": LOG_SECONDS, "miniters": 1,
                    "delay": LOG_SECONDS,
                    "bar_format": "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, "
                                  "{remaining} left{postfix}"}
    return tqdm(iterable, **options)


class _JobLog(io.StringIO):
    """Prints each update of tqdm on a line of its own."""

    def write(self, text: str) -> int:
        if text.strip():
            print(*text.split(), flush=True)
        return len(text)


class _Unbroken:
    """A stream whose reader may have gone, as with `| head`: what is written then is lost, and the
    script goes on."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return len(text)


def stop(signum: int, frame: Any) -> None:
    """What Ctrl-C and SIGTERM do while a script runs."""
    raise KeyboardInterrupt(signum)


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status. Every line of output is flushed; SIGTERM
    stops the script like Ctrl-C, with status 128 + the signal's number.

    A Failure, a disk that is full or read-only, and too little memory end it with one line; any
    other error keeps its traceback.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stdout, sys.stderr = _Unbroken(sys.stdout), _Unbroken(sys.stderr)
    on_stop(stop)
    try:
        status, message = _run_explained(main)
    except KeyboardInterrupt as stopped:  # possibly while an error is explained
        status, message = 128 + (stopped.args or [signal.SIGINT])[0], "stopped"
    on_stop(signal.SIG_IGN)  # the message is printed whole
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    on_stop(signal.SIG_DFL)  # no traceback while the interpreter ends
    sys.exit(status)


def on_stop(action: Callable | int) -> None:
    """Sets what Ctrl-C and SIGTERM do: a handler, signal.SIG_IGN or signal.SIG_DFL."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, action)


def _run_explained(main):
    """Exit status of main, and one line on the error that ended it; re-raises any other error."""
    try:
        return main(), ""
    except Failure as error:
        return error.status, f"error: {error}"
    except OSError as error:
        if "No usable temporary directory" in str(error):
            return 2, "error: no temporary folder is writable: set TMPDIR to one that is"
        if error.errno not in DISK_ERRORS:
            raise
        return 1, (f"error: {error.strerror}: {error.filename or 'output'}; what was written "
                   "before is intact")
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class for the memory of a GPU alone
        is_fault = not re.search("out of memory|allocate memory", str(error))
        if is_fault and not isinstance(error, MemoryError):
            raise
        return 1, "error: out of memory: lower --batch-size or raise --rescale-factor"
