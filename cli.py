"""What the scripts share: paths from the TRAINML_* variables, flags, atomic writes, progress lines,
and user errors reported on one line."""

import argparse
import contextlib
import csv
import errno
import io
import math
import os
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

VERSION = "2.0"  # the newest in CHANGELOG.md
FOLDERS = {"TRAINML_DATA_PATH": "data", "TRAINML_MODEL_PATH": ".", "TRAINML_OUTPUT_PATH": "output"}
IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
RESCALE_FACTORS = (1, 2, 4, 8, 16)
NAMED = 5  # items named in a warning; the rest are counted
LOG_SECONDS = 30  # between progress lines in a job log
FIRST_SECONDS = 10  # for the first of several processes to report an error
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class InputError(ValueError):
    """Something the user gave cannot be used; the message has the found value and the remedy."""
    status = 2


class InternalError(RuntimeError):
    """A bug of ours, its traceback already printed, left nothing to continue with."""
    status = 1


def default_path(variable: str, *parts: str) -> str:
    """Path below the folder that a TRAINML_* variable names, or below its local default."""
    return os.path.join(os.environ.get(variable) or FOLDERS[variable], *parts)


def require(path: str | Path, kind: str, *, flag: str, variable: str | None = None) -> Path:
    """Returns `path` as a Path. A "file" or "folder" must exist, "data" may be either but not a zip
    file, and an "output" folder is created and must be writable.

    Raises InputError naming path, flag and variable.
    """
    path = Path(path)
    remedy = f"{flag}, or set {variable}" if variable else flag
    if kind == "output":
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise InputError(f"cannot write to {path} ({error.strerror}): give another folder "
                             f"with {remedy}") from None
    elif not os.path.exists(path):  # Path.exists raises for a name too long, or no permission
        raise InputError(f"{path} does not exist: give another with {remedy}")
    elif kind != "file" and not (path.is_file() or path.is_dir()):  # a pipe is read only once
        raise InputError(f"{path} is neither a file nor a folder: give another with {remedy}")
    elif kind != "file" and zipfile.is_zipfile(path):
        raise InputError(f"{path} is a zip file, not a folder: give the folder that it unpacks to "
                         f"with {remedy}")
    elif kind == "folder" and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder: give the folder that it is in with "
                         f"{remedy}")
    return path


class Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag with the help as given; Python 3.10 to 3.12 would add a default."""

    def __init__(self, *, help: str, **options):
        super().__init__(**options)
        self.help = help


class Parser(argparse.ArgumentParser):
    """argparse's parser whose errors are InputErrors: one line, without the usage before it."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")

    def add_runtime_options(self, *, batch_size: int, rescale_factor: int | None) -> None:
        """Flags on how a network runs; a `rescale_factor` of None means the checkpoint's."""
        add = self.add_argument_group("how the network runs").add_argument
        add("--rescale-factor", "--rf", type=int, choices=RESCALE_FACTORS, default=rescale_factor,
            help=f"{IMAGE_SIDE} / side of the network's image in pixels "
                 f"(default: {rescale_factor or 'that of the checkpoint'})")
        add("--batch-size", "--bs", type=bounded(1, math.inf, int), default=batch_size,
            help="images in a batch, 1 or more (default: %(default)s)")
        add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
            help="auto takes the first that is available (default: %(default)s)")
        add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
            help="auto takes the fastest that the device computes natively (default: %(default)s)")
        add("--workers", type=bounded(1, math.inf, int), default=usable_cores(),
            help="processes that decode images (default: the cores of this job, %(default)s)")


def bounded(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A type for argparse: a finite number of type `kind` in low..high."""
    allowed = f"{low:g} or more" if math.isinf(high) else f"between {low:g} and {high:g}"

    def parse(text: str) -> float:
        value = kind(text)
        if value == math.inf or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value
    parse.__name__ = "number"  # argparse: "invalid number value"
    return parse


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: a job or container often has fewer than the machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            texts = [(cgroup / name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BufferedWriter]:
    """Yields a binary file that replaces `path` if the block succeeds; otherwise the old file stays
    as it was."""
    temporary = Path(path).with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
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
               "unit_scale": scale if scale > 1 else False, "disable": not _is_first()}
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


def _is_first():
    """Whether this process prints for all that torchrun started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _terminate(signum, frame):
    raise KeyboardInterrupt(signum)


def _explain(error):
    """Exit status and message of an error that the user can fix, or whose traceback was printed;
    re-raises any other."""
    text = str(error)
    if isinstance(error, (InputError, InternalError)):
        return error.status, text
    if "No usable temporary directory" in text:
        return 2, "no temporary folder is writable: set TMPDIR to one that is"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        path = error.filename or "output"
        return 1, f"{error.strerror}: {path}; what was written before is intact"
    if isinstance(error, RuntimeError) and "gloo/transport" in text:
        return 1, "another process of this run has ended"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return 1, "out of memory: lower --batch-size or raise --rescale-factor"
    raise error


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status. Every line of output is flushed; SIGTERM
    stops the script like Ctrl-C, with status 128 + the signal's number.

    An error is printed on one line, with status 2 if it is the user's and 1 if the disk is full or
    read-only, memory runs out, another process has ended, or it is an InternalError. Any other
    keeps its traceback.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if not _is_first():
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            status, message = main(), ""
        except Exception as error:
            status, reason = _explain(error)
            message = f"error: {reason}"
            if _is_first():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the message is printed whole
            else:  # if all have this error, the first one reports it, and torchrun stops this one
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(FIRST_SECONDS)
    except KeyboardInterrupt as stop:  # possibly while an error is explained
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        message = "stopped" if _is_first() else ""
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    for signum in STOP_SIGNALS:  # no traceback while the interpreter ends
        signal.signal(signum, signal.SIG_DFL)
    sys.exit(status)
