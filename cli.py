"""What the scripts share: paths from the TRAINML_* variables, flags, whole files, progress lines,
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
RESULTS = ("images", "validation", "logs", "curves.png", "scores.png")  # in an output folder
NAMED = 5  # items named in a warning; the rest are counted
LOG_SECONDS = 30  # between progress lines in a job log
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class InputError(ValueError):
    """Something the user gave cannot be used; the message holds the found value and the remedy."""


class InternalError(RuntimeError):
    """A fault of our own, whose traceback is already printed, leaves nothing to go on with."""


def default_path(variable: str, *parts: str) -> str:
    """Path below the folder that a TRAINML_* variable names, or below its local default."""
    return os.path.join(os.environ.get(variable) or FOLDERS[variable], *parts)


def require(path: str | Path, kind: str, *, flag: str, variable: str | None = None) -> Path:
    """Returns `path` as a Path once it is a "file", a "folder" or "data", which is either but no
    zip file, or an "output" folder, which is created; raises InputError naming path, flag and
    variable if not."""
    path = Path(path)
    remedy = flag + (f", or set {variable}" if variable else "")
    if kind == "output":
        _prove_writable(path, remedy)
    elif not path.exists():
        raise InputError(f"{path} does not exist: give another with {remedy}")
    elif kind in ("folder", "data") and not path.is_dir():
        is_zip = path.is_file() and zipfile.is_zipfile(path)
        found, other = ("a zip file", "unpacks to") if is_zip else ("a file", "is in")
        if is_zip or kind == "folder":
            raise InputError(f"{path} is {found}, not a folder: give the folder that it {other} "
                             f"with {remedy}")
    return path


def _prove_writable(folder, remedy):
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): give another folder with "
                         f"{remedy}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def result_folders(output: Path, data: Path) -> list[Path]:
    """Folders and pictures of results that a search of `data` leaves out: `output` if it lies
    inside, else those in it."""
    output = output.resolve()
    if data.resolve() in output.parents:
        return [output]
    return [output / name for name in RESULTS]


class Parser(argparse.ArgumentParser):
    """argparse's parser with errors on one line, without the usage before them."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def bounded(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A type for argparse: a number of `kind`, finite and in low..high."""
    allowed = f"{low:g} or more" if math.isinf(high) else f"between {low:g} and {high:g}"

    def parse(text):
        if not (low <= kind(text) <= high and math.isfinite(kind(text))):
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return kind(text)
    parse.__name__ = "number"  # argparse: "invalid number value"
    return parse


def add_runtime_options(parser: argparse.ArgumentParser, *, batch_size: int,
                        rescale_factor: int | None) -> None:
    """The flags on how a network runs; no rescale factor stands for the checkpoint's."""
    add = parser.add_argument_group("how the network runs").add_argument
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


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: a job or container often has fewer than the machine."""
    if hasattr(os, "process_cpu_count"):
        cores = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            texts = [(cgroup / name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores or 1


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


def progress(iterable: Iterable, *, total: int, description: str) -> Iterator:
    """A bar on a terminal; in a job log a plain line every LOG_SECONDS."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=description, leave=False)
        return
    shown = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        if time.monotonic() - shown > LOG_SECONDS:
            shown = time.monotonic()
            print(f"{description}: {done} of {total}", flush=True)


def _terminate(signum, frame):
    raise KeyboardInterrupt(signum)


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits. Lines are flushed and SIGTERM ends it like Ctrl-C.

    Status 2, with one line, for a user's error; 1, with one line, for a full or read-only disk, too
    little memory and InternalError; 128 + the signal when stopped.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status, message = main(), None
    except InputError as error:
        status, message = 2, f"error: {error}"
    except InternalError as error:
        status, message = 1, f"error: {error}"
    except OSError as error:
        if "No usable temporary directory" in str(error):
            status, message = 2, "error: no temporary folder can be written to: set TMPDIR to one"
        elif error.errno in DISK_ERRORS:
            status, message = 1, (f"error: {error.strerror}: {error.filename or 'output'}; "
                                  "what was written before is intact")
        else:
            raise
    except (MemoryError, RuntimeError) as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        status, message = 1, "error: out of memory: lower --batch-size or raise --rescale-factor"
    except KeyboardInterrupt as stop:
        status, message = 128 + (stop.args[0] if stop.args else signal.SIGINT), "stopped"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
