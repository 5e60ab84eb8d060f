"""Runs a function on files in separate processes, so that a file that crashes its decoder, hangs or
takes too much memory costs only itself.

Why not a library: the pool of concurrent.futures breaks when a worker dies; pebble's needs
semaphores, which a container without /dev/shm lacks, and limits wall-clock time, not CPU time.
"""

import mmap
import multiprocessing
import os
import signal
import stat
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

from .dicom import read_radiograph
from .errors import ImageWarning, UnreadableImage, reason_of

TIME_LIMIT = 20  # seconds of CPU time for one file; MAX_PIXELS of JPEG 2000 take 6 on a server
WAIT_LIMIT = 300  # wall-clock seconds, for a reader that hangs without using the CPU
MEMORY_LIMIT = 5 * 2**28  # bytes; some MB of hostile DICOM can inflate to many GB


def _limit_memory():
    """Lets this process allocate no more than MEMORY_LIMIT beyond what it holds."""
    if sys.platform != "linux":
        return
    import resource
    held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    with suppress(ValueError):  # there is a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT, held + MEMORY_LIMIT))


class Reading(NamedTuple):
    """The result for one file: a `value` with a `note` on what was ignored or is in doubt, if
    anything, or a `problem`; both complete a sentence that starts with the file's name."""
    value: Any = None
    problem: str = ""
    note: str = ""
    trace: str = ""  # traceback, where the problem is a fault of this code

    @property
    def internal_error(self) -> bool:
        """Whether a fault of this code is to blame, not the file."""
        return bool(self.trace)


def _reading_of(function, path, caught):
    caught.clear()
    _limit_time(TIME_LIMIT)
    try:
        value = function(path)
    except UnreadableImage as error:
        return Reading(problem=str(error))
    except MemoryError as error:
        return Reading(problem=reason_of(error))
    except Exception:
        problem = "was not read because of an internal error; its traceback is on stderr"
        return Reading(problem=problem, trace=traceback.format_exc())
    notes = dict.fromkeys(str(warning.message) for warning in caught)
    return Reading(value, note="; ".join(notes))


def _limit_time(seconds):
    """Lets SIGPROF kill this process after `seconds` of CPU time; 0 means never."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve(connection, parent_end, function):
    """Loop of a reader: silences stderr, ignores Ctrl-C, ends when the parent closes the pipe."""
    parent_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    _drop_sockets(connection.fileno(), null)
    _limit_memory()
    with warnings.catch_warnings(record=True) as caught, suppress(EOFError, OSError):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ImageWarning)
        while True:
            readings = [_reading_of(function, path, caught) for path in connection.recv()]
            _limit_time(0)
            connection.send(readings)


def _drop_sockets(own, null):
    """Closes inherited sockets, so that a server's connections end when the server closes them;
    their descriptors point to `null`, so that they are not reused."""
    if sys.platform != "linux":  # nothing is inherited
        return
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the listing's own is closed by now
            if descriptor != own and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.dup2(null, descriptor)


_starting = Lock()  # no reader may inherit the child's end of another reader's pipe


class ReaderPool:
    """Processes that call `function` on the items they are sent, each for one caller at a time. Any
    thread may call, and waits for an idle reader; one that died is replaced when it is needed.

    The function raises UnreadableImage for a file that it cannot read, and issues an ImageWarning
    about what it ignores.
    """

    def __init__(self, function: Callable[[Any], Any], readers: int):
        self.function, self.readers = function, readers
        self.started = []
        self.idle = SimpleQueue()  # of (process, connection), or of None for a reader to be started
        for _ in range(readers):
            self.idle.put(self._start())
        self.threads = ThreadPoolExecutor(readers)  # for calls in the background

    def _start(self):
        # fork starts in milliseconds and is safe here: a reader runs neither PyTorch nor threads
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with _starting:
            ours, theirs = context.Pipe()  # pipes need no semaphores, so /dev/shm may be missing
            arguments = theirs, ours, self.function
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.started.append(process)
        return process, ours

    def _end(self, process, connection):
        """Kills a reader, so that another starts when it is needed; returns the exit code."""
        connection.close()
        with _starting:
            process.kill()
            process.join()
            self.started.remove(process)
        self.idle.put(None)
        return process.exitcode

    def _take(self):
        """An idle reader; if none can be started now, one may be later."""
        reader = self.idle.get()
        while reader and reader[1].poll():  # nothing was sent yet, so this reader is dead
            self._end(*reader)
            reader = self.idle.get()
        try:
            return reader or self._start()
        except BaseException:
            self.idle.put(None)
            raise

    def _read_chunk(self, chunk):
        """A Reading of each item, or the problem that ended their reader. Raises OSError or
        MemoryError if no reader can be started."""
        process, connection = self._take()
        problem = f"took more than {WAIT_LIMIT} seconds to read"
        try:
            connection.send(chunk)
            if connection.poll(WAIT_LIMIT):
                readings = connection.recv()
                self.idle.put((process, connection))
                return readings
        except (EOFError, OSError, MemoryError):
            problem = "crashed its decoder"
        if -self._end(process, connection) == getattr(signal, "SIGPROF", None):
            problem = f"took more than {TIME_LIMIT} seconds of CPU time to decode"
        return problem

    def read(self, item: Any) -> Reading:
        """Reading of one item."""
        readings = self._read_chunk([item])
        return Reading(problem=readings) if isinstance(readings, str) else readings[0]

    def read_ahead(self, items: Sequence, chunk_size: int) -> Iterator[Reading]:
        """Yields a Reading of each item, in order; up to `chunk_size` are sent to a reader at a
        time. If a reader crashes or takes too long, its items are retried one by one while no other
        is read. The first traceback of an internal error is printed."""
        size = min(chunk_size, len(items) // (4 * self.readers) + 1)
        chunks = deque(items[first:first + size] for first in range(0, len(items), size))
        window = deque()  # of (chunk, future)
        printed = False
        while chunks or window:
            while chunks and len(window) <= 2 * self.readers:
                chunk = chunks.popleft()
                window.append((chunk, self.threads.submit(self._read_chunk, chunk)))
            chunk, future = window.popleft()
            readings = future.result()
            if isinstance(readings, str):
                wait([future for _, future in window])
                readings = [self.read(item) for item in chunk]
            for reading in readings:
                if reading.trace and not printed:
                    print(reading.trace, file=sys.stderr)
                    printed = True
                yield reading

    def stop(self) -> None:
        """Ends all readers."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self.started):
            process.kill()
        self.threads.shutdown()
        for process in self.started:  # some may have been started since
            process.kill()
            process.join()


@contextmanager
def readings_of(function: Callable[[Path], Any], paths: Iterable[Path], *, workers: int,
                chunk_size: int = 8) -> Iterator[Iterator[Reading]]:
    """For a `with` block, whose end ends the processes: a Reading of function(path) for each path,
    in order. Up to `chunk_size` paths are sent to a process at a time."""
    paths = list(paths)
    pool = ReaderPool(function, min(workers, len(paths)) or 1)
    try:
        yield pool.read_ahead(paths, chunk_size)
    finally:
        pool.stop()


def read_images(paths: Iterable[Path], *, side: int, workers: int, display_size: int | None = None,
                ) -> AbstractContextManager[Iterator[Reading]]:
    """For a `with` block: a Reading of read_radiograph for each path, in order."""
    function = partial(read_radiograph, side=side, display_size=display_size)
    return readings_of(function, paths, workers=workers)
