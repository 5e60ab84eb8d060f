"""What the scripts share: paths from the TRAINML_* variables, flags, whole files, progress lines,
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
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

FOLDERS = {"TRAINML_DATA_PATH": "data", "TRAINML_MODEL_PATH": ".", "TRAINML_OUTPUT_PATH": "output"}
IMAGE_SIDE = 1024  # pixels a side in the challenge; the network sees IMAGE_SIDE / rescale_factor
RESCALE_FACTORS = (1, 2, 4, 8, 16)
RESULTS = (  # in an output folder
    "images", "validation", "logs", "curves.png", "scores.png", "report.html", "annotations.json",
    "submission.csv", "skipped.csv", "split.csv", "metrics.json", "last.pth.tar",
    "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar")
NAMED = 5  # items named in a warning; the rest are counted
LOG_SECONDS = 30  # between progress lines in a job log
FIRST_SECONDS = 10  # in which the first of several processes tells of an error
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class InputError(ValueError):
    """Something the user gave cannot be used; the message holds the found value and the remedy."""
    status = 2


class InternalError(RuntimeError):
    """A fault of our own, whose traceback is already printed, leaves nothing to go on with."""
    status = 1


def default_path(variable: str, *parts: str) -> str:
    """Path below the folder that a TRAINML_* variable names, or below its local default."""
    return os.path.join(os.environ.get(variable) or FOLDERS[variable], *parts)


def require(path: str | Path, kind: str, *, flag: str, variable: str | None = None) -> Path:
    """Returns `path` as a Path once it is a "file", a "folder" or "data", which is either but no
    zip file, or an "output" folder, which is created; raises InputError naming path, flag and
    variable if not."""
    path, remedy = Path(path), flag + (f", or set {variable}" if variable else "")
    if kind == "output":
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise InputError(f"cannot write to {path} ({error.strerror}): give another folder "
                             f"with {remedy}") from None
    elif not path.exists():
        raise InputError(f"{path} does not exist: give another with {remedy}")
    elif kind in ("folder", "data") and not path.is_dir():
        is_zip = zipfile.is_zipfile(path)
        found, other = ("a zip file", "unpacks to") if is_zip else ("a file", "is in")
        if is_zip or kind == "folder":
            raise InputError(
                f"{path} is {found}, not a folder: give the folder that it {other} with {remedy}")
    return path


def result_folders(output: Path, data: Path) -> list[Path]:
    """Folders and files of results that a search of `data` leaves out: `output` if it lies inside,
    else those in it."""
    output = output.resolve()
    if data.resolve() in output.parents:
        return [output]
    return [output / name for name in RESULTS]


class Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag; the help stays as it is, to which Python 3.10 to 3.12 add a default."""

    def __init__(self, *, help: str, **options):
        super().__init__(**options)
        self.help = help


class Parser(argparse.ArgumentParser):
    """argparse's parser with errors on one line, without the usage before them."""

    def error(self, message: str) -> None:
        _let_first_tell()
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")

    def add_runtime_options(self, *, batch_size: int, rescale_factor: int | None) -> None:
        """The flags on how a network runs; no rescale factor stands for the checkpoint's."""
        add = self.add_argument_group("how the network runs").add_argument
        add("--rescale-factor", "--rf", type=int, choices=RESCALE_FACTORS, default=rescale_factor,
            help=f"{IMAGE_SIDE} / side of the network's image in pixels "
                 f"(default: {rescale_factor or 'that of the checkpoint'})")
        add("--batch-size", "--bs", type=bounded(1, math.inf, int), default=batch_size,
            help="images in a batch, 1 or more (default: %(default)s)")
        add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
            help="auto takes the first that is there (default: %(default)s)")
        add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
            help="auto takes the fastest that the device computes natively (default: %(default)s)")
        add("--workers", type=bounded(1, math.inf, int), default=usable_cores(),
            help="processes that decode images (default: the cores of this job, %(default)s)")


def bounded(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A type for argparse: a number of `kind`, finite and in low..high."""
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
    """Binary file that takes the place of `path` when the block ends well; otherwise the old file
    stays as it was."""
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
    """Writes UTF-8, whole or not at all; undecodable bytes of file names are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """Writes rows as write_text does."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(path, table.getvalue())


def warn(what: str, items: Iterable) -> None:
    """Prints a count and the first few of `items`; nothing if there are none."""
    items = [str(item) for item in items]
    if items:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        print(f"warning: {len(items)} {what}: {', '.join(items[:NAMED])}{more}")


def batched(iterable: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter (itertools.batched needs Python 3.12)."""
    iterator = iter(iterable)
    while batch := list(islice(iterator, size)):
        yield batch


def progress(iterable: Iterable, *, total: int, description: str, unit: str = " images",
             scale: int = 1) -> tqdm:
    """A bar on a terminal; in a job log a plain line every LOG_SECONDS. One of the `total` steps
    stands for `scale` units. `set_postfix_str` of what is returned adds to the bar or line."""
    options = {"total": total, "desc": description, "unit": unit,
               "unit_scale": scale > 1 and scale, "leave": False, "disable": not _is_first()}
    if not sys.stderr.isatty():
        options |= {"file": _JobLog(), "mininterval": LOG_SECONDS, "miniters": 1,
                    "delay": LOG_SECONDS,
                    "bar_format": "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, "
                                  "{remaining} left{postfix}"}
    return tqdm(iterable, **options)


class _JobLog(io.StringIO):
    """Prints what tqdm would draw over and over in one line as lines of their own."""

    def write(self, text: str) -> int:
        if text.strip():
            print(*text.split(), flush=True)
        return len(text)


def _is_first():
    """Whether this is the process that speaks for all that torchrun started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _let_first_tell():
    """Gives the first process time to tell of an error that this one has, too, and to end, upon
    which torchrun ends this one."""
    if not _is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_SECONDS)


def _terminate(signum, frame):
    raise KeyboardInterrupt(signum)


def _explain(error):
    """Exit status and message of an error that a user can mend, or whose traceback was printed;
    raises any other again."""
    text = str(error)
    if isinstance(error, (InputError, InternalError)):
        return error.status, text
    if "No usable temporary directory" in text:
        return 2, "no temporary folder can be written to: set TMPDIR to one"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = error.filename or "output"
        return 1, f"{error.strerror}: {place}; what was written before is intact"
    if isinstance(error, RuntimeError) and re.search("(closed|reset) by peer", text):  # Gloo
        return 1, "another process of this run has ended"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return 1, "out of memory: lower --batch-size or raise --rescale-factor"
    raise error


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status. Lines are flushed and SIGTERM ends it like
    Ctrl-C, with status 128 + the signal.

    An error is one line and status 2 if the user's, 1 if it is a full or read-only disk, too little
    memory or InternalError; any other keeps its traceback.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if not _is_first():
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status, message = main(), ""
    except KeyboardInterrupt as stop:
        status, message = 128 + (stop.args[0] if stop.args else signal.SIGINT), "stopped"
        message = message if _is_first() else ""
    except Exception as error:
        status, reason = _explain(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # last words are not cut short
        _let_first_tell()
        message = f"error: {reason}"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
