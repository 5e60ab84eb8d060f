"""What every script shares as a trainML job or a local run: paths from the TRAINML_* variables, files that are written
whole or not at all, signals, and mistakes told in one line."""

import contextlib
import ctypes
import errno
import math
import os
import signal
import sys
import threading
import zipfile
from pathlib import Path

FOLDERS = {"TRAINML_DATA_PATH": "data", "TRAINML_MODEL_PATH": ".", "TRAINML_OUTPUT_PATH": "output"}


class InputError(ValueError):
    """Something the user gave cannot be used; the message holds the found value and the remedy."""


class InternalError(RuntimeError):
    """A fault of our own, whose traceback is already printed, leaves nothing to go on with."""


def default_path(variable, *parts):
    """Path below the folder that a TRAINML_* variable names, or below its local default when it is unset or empty."""
    return os.path.join(os.environ.get(variable) or FOLDERS[variable], *parts)


def require(path, *, flag, variable):
    """Returns `path` as a Path; raises InputError naming path, flag and variable if nothing is there."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist: give another with {flag}, or set {variable}")
    return Path(path)


def require_folder(path: str | Path, *, flag: str, variable: str) -> Path:
    """Returns `path` as a Path; raises InputError if there is nothing, or a file."""
    path = require(path, flag=flag, variable=variable)
    if path.is_dir():
        return path
    kind, remedy = "a file", "the folder that holds it"
    if path.is_file() and zipfile.is_zipfile(path):
        kind, remedy = "a zip file", "the folder it unpacks to"
    raise InputError(f"{path} is {kind}, not a folder: give {remedy} with {flag}, or set {variable}")


def result_folders(output: str | Path, data: str | Path) -> list[Path]:
    """What a search of `data` leaves out: `output` if it lies inside, else the results in it."""
    output = Path(output).resolve()
    if Path(data).resolve() in output.parents:
        return [output]
    return [output / name for name in ("images", "validation", "logs")]


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: a job or a container often has fewer than the machine."""
    if hasattr(os, "process_cpu_count"):
        cores = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            texts = [(cgroup / name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores or 1


def make_folder(path, *, flag, variable):
    """Creates the folder if needed and proves that it can be written to; raises InputError if not."""
    probe = Path(path, f".write-test-{os.getpid()}")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise InputError(f"cannot write to {path} ({error.strerror}): give another folder with {flag}, "
                         f"or set {variable}") from None
    return Path(path)


@contextlib.contextmanager
def atomic_write(path):
    """Binary file that takes the place of `path` when the block ends well; otherwise the old file stays as it was."""
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


def keep_freed_memory():
    """Lets glibc keep freed memory for the next batch: what it returns to Linux comes back as pages to be cleared, a
    third of a training step on a CPU with bf16 units. Constants: malloc.h and mallopt(3)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never


def _terminate(signum, frame):
    raise KeyboardInterrupt(signum)


def run(main):
    """Runs a script's `main`: lines are flushed, SIGTERM ends it like Ctrl-C, a user's mistake is one line and status
    2; a full or read-only disk and too little memory are one line and status 1."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except InternalError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if "No usable temporary directory" in str(error):
            print(f"{name}: error: no temporary folder can be written to: set TMPDIR to one that can",
                  file=sys.stderr)
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        print(f"{name}: error: {error.strerror}: {error.filename or 'output'}; what was written before is intact",
              file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        print(f"{name}: error: out of memory: lower --batch-size, or raise --rescale-factor", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
