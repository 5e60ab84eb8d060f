import _multiprocessing
import gc
import io
import multiprocessing
import os
import signal
import socket
import time
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from radiographs import readers
from radiographs.dicom import read_radiograph
from radiographs.errors import ImageWarning, UnreadableImage
from radiographs.readers import Reading, readings_of

# What the readers call must be importable where processes are spawned, and so lies up here


def name_of(path):
    return path.name


def die_of_3(path):
    if path.name == "3":
        os.kill(os.getpid(), signal.SIGTERM)
    return path.name


def spin():
    while True:
        pass


def hang_at_3(hang, path):
    if path.name == "3":
        hang()
    return path.name


def die_once_and_list_those_being_read(path):
    """Dies of the file 9, but only once; returns the names of the files that others read now."""
    tried, busy = path.with_suffix(".tried"), path.with_suffix(".busy")
    again = tried.exists()
    tried.touch()
    busy.touch()
    if path.name == "9" and not again:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02)
    others = sorted(path.parent.glob("*.busy"))
    busy.unlink()
    return [other.stem for other in others] if again else None


def work_a_while(path):
    started = time.process_time()
    while time.process_time() - started < 0.25:
        pass


def make_a_mistake(path):
    if path.name in "357":
        raise KeyError(path.name)
    return path.name


def fail(error, path):
    raise error


def warn(path):
    if path.name == "0":
        warnings.warn("is constant", ImageWarning)
        warnings.warn("has 2 frames", ImageWarning)
    warnings.warn("will be removed", DeprecationWarning)
    return path.name


def print_on_stderr(path):
    os.write(2, b"decoder: corrupt data")
    return path.name


def numbers(folder, count):
    return [folder / str(number) for number in range(count)]


def read_all(function, paths, workers=2):
    with readings_of(function, paths, workers=workers) as readings:
        return list(readings)


def test_files_are_read_in_order(tmp_path):
    paths = numbers(tmp_path, 100)
    assert [reading.value for reading in read_all(name_of, paths)] == [path.name for path in paths]


def test_without_files_there_are_no_readings():
    assert read_all(name_of, []) == []


def test_a_crash_costs_one_file(tmp_path):
    values = [reading.value for reading in read_all(die_of_3, numbers(tmp_path, 20))]
    assert values == [str(number) if number != 3 else None for number in range(20)]
    assert read_all(die_of_3, [tmp_path / "3"]) == [Reading(problem="crashed its decoder")]


@pytest.mark.linux
@pytest.mark.parametrize("limit, seconds, hang, problem", [
    ("TIME_LIMIT", 0.3, spin, "took more than 0.3 seconds of CPU time to decode"),
    # long enough for a reader to start on a busy machine
    ("WAIT_LIMIT", 2, getattr(signal, "pause", None), "took more than 2 seconds to read")])
def test_a_hang_costs_one_file(tmp_path, monkeypatch, limit, seconds, hang, problem):
    monkeypatch.setattr(readers, limit, seconds)  # the readers are forked, so they see it
    readings = read_all(partial(hang_at_3, hang), numbers(tmp_path, 8))
    assert [reading.problem or reading.value for reading in readings] == [
        "0", "1", "2", problem, "4", "5", "6", "7"]


def test_a_signal_is_not_lost_that_comes_while_readers_end(tmp_path, monkeypatch):
    def stop(pool, stop=readers.ReaderPool.stop):
        stop(pool)
        raise KeyboardInterrupt
    monkeypatch.setattr(readers.ReaderPool, "stop", stop)
    paths = numbers(tmp_path, 4)
    with pytest.raises(KeyboardInterrupt):
        with readings_of(name_of, paths, workers=1) as readings:
            for _ in zip(paths, readings):  # leaves the readings unfinished
                pass


def test_a_file_that_ended_its_reader_is_tried_again_while_no_other_is_read(tmp_path):
    readings = read_all(die_once_and_list_those_being_read, numbers(tmp_path, 40))
    assert not any(reading.problem for reading in readings) and readings[9].value == ["9"]


@pytest.mark.linux
def test_the_same_files_are_read_on_one_core_with_many_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "TIME_LIMIT", 1)  # the eight together take two seconds
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        readings = read_all(work_a_while, numbers(tmp_path, 8), workers=8)
    finally:
        os.sched_setaffinity(0, cores)
    assert not [reading.problem for reading in readings if reading.problem]


def test_a_fault_of_our_own_is_printed_once_and_costs_its_files(tmp_path, capfd):
    readings = read_all(make_a_mistake, numbers(tmp_path, 10))
    values = [reading.value for reading in readings]
    assert values == ["0", "1", "2", None, "4", None, "6", None, "8", "9"]
    assert [reading.internal_error for reading in readings] == [not value for value in values]
    assert "internal error" in readings[3].problem
    errors = capfd.readouterr().err
    assert errors.count("Traceback") == 1 and "KeyError: '3'" in errors


@pytest.mark.linux
def test_files_are_read_without_semaphores(tmp_path, monkeypatch):
    def refuse(*_):
        raise FileNotFoundError(2, "No such file or directory")
    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    assert len(read_all(name_of, numbers(tmp_path, 10))) == 10


@pytest.mark.parametrize("error, problem", [
    (UnreadableImage("has no pixel data"), "has no pixel data"),
    (MemoryError(), "takes too much memory to read")])
def test_a_file_that_cannot_be_read_has_its_reason_and_no_traceback(
        tmp_path, capfd, error, problem):
    [reading] = read_all(partial(fail, error), [tmp_path])
    assert reading == Reading(problem=problem) and not capfd.readouterr().err


def test_what_an_image_lacks_is_noted_and_other_warnings_are_not(tmp_path):
    noted, plain = read_all(warn, numbers(tmp_path, 2), workers=1)
    assert noted == Reading("0", note="is constant; has 2 frames")
    assert plain == Reading("1")


def test_what_a_decoder_prints_on_stderr_is_not_shown(tmp_path, capfd):
    readings = read_all(print_on_stderr, numbers(tmp_path, 3))
    assert [reading.value for reading in readings] == ["0", "1", "2"]
    assert not capfd.readouterr().err


@pytest.fixture
def pool():
    """Two readers that return what they are given."""
    pool = readers.ReaderPool(int, 2)
    yield pool
    pool.stop()


def kill_all(pool):
    for process in list(pool.started):
        process.kill()
        process.join()


def test_a_reader_of_a_server_that_dies_while_it_is_idle_costs_nothing(pool):
    kill_all(pool)
    assert [pool.read(number) for number in range(4)] == list(map(Reading, range(4)))
    assert len(pool.started) == 2


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
def test_a_reader_that_cannot_be_started_now_is_started_later(pool, monkeypatch, error):
    kill_all(pool)
    with monkeypatch.context() as patch:
        def refuse(*_):
            raise error
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        for number in range(5):
            with pytest.raises(type(error)):
                pool.threads.submit(pool.read, number).result(timeout=20)
    readings = [pool.threads.submit(pool.read, number).result(timeout=20) for number in range(4)]
    assert readings == list(map(Reading, range(4)))
    assert len(pool.started) <= 2


@pytest.mark.linux
def test_a_server_that_loses_many_readers_keeps_no_files_of_them_open(pool):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        kill_all(pool)
        pool.read(0), pool.read(0)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_reader_holds_no_connection_of_a_server_open():
    client, server = socket.socketpair()
    pool = readers.ReaderPool(str, 1)
    server.close()
    client.settimeout(10)
    assert client.recv(1) == b""  # the end: nobody else has it
    pool.stop()
    client.close()


def test_images_come_as_bytes_with_their_original_size(tmp_path, write_dicom):
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    path = write_dicom(tmp_path / "a.dcm", pixels)
    with readers.read_images([path], side=64, workers=1) as readings:
        [reading] = readings
    image, original_size, _ = reading.value
    assert original_size == (64, 64) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, (pixels / 4095 * 255 + 0.5).astype(np.uint8))


def test_a_file_in_memory_is_read_as_on_disk(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
    for path in (path, tmp_path / "a.png"):
        expected, read = [read_radiograph(file, 64, 64)
                          for file in (path, io.BytesIO(path.read_bytes()))]
        assert expected.original_size == read.original_size
        np.testing.assert_array_equal(expected.image, read.image)
        np.testing.assert_array_equal(expected.display, read.display)
