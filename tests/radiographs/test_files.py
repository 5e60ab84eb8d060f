import os

import numpy as np
import pytest
from PIL import Image

from radiographs.dicom import read_header, start_of
from radiographs.errors import UnreadableImage
from radiographs.files import find_dicom_files, find_radiographs

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)


def touch(path, content=bytes(128) + b"DICM"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def find(folder, *leave_out):
    """Ids {patient_id: path} and reasons {path: reason}, paths as text below the folder."""
    files, skipped = find_dicom_files(folder, leave_out)
    return ({key: path.relative_to(folder).as_posix() for key, path in files.items()},
            {path.relative_to(folder).as_posix(): reason for path, reason in skipped})


@pytest.mark.linux
def test_files_are_found_in_sub_folders_whatever_their_case(tmp_path):
    names = ["x.dcm/deep/Ünïcode name.DCM", "1.2.840.10008", "1.2.840.10009", "b.dcm",
             ".hidden.dcm"]
    for name in names:
        touch(tmp_path / name, b"")
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "gone.dcm").symlink_to("nowhere")
    files, reasons = find(tmp_path)
    assert sorted(files) == ["1.2.840.10008", "1.2.840.10009", "b", "Ünïcode name"]
    assert reasons == {"x.dcm": "is a folder", "pipe.dcm": "is not a regular file",
                       "gone.dcm": "is a link to nothing"}


@pytest.mark.parametrize("sidecar", ["A/x.xml", "x.csv", "x.bmp", "x.JPG", "A/x.dcm", "x", "A/x"])
def test_a_file_that_is_not_dicom_claims_no_id(tmp_path, sidecar):
    touch(tmp_path / "J" / "x.dcm")
    touch(tmp_path / sidecar, b"no DICOM")
    assert find(tmp_path) == ({"x": "J/x.dcm"}, {sidecar: "is not a DICOM file"})


def test_a_dicom_file_may_have_the_suffix_of_another_kind(tmp_path):
    touch(tmp_path / "x.img")
    assert find(tmp_path) == ({"x": "x.img"}, {})


def test_plain_names_are_not_opened(tmp_path, monkeypatch):
    for name in ("a.dcm", "b.DCM", "1.2.3", "IM0"):
        touch(tmp_path / name)

    def refuse(*_):
        raise AssertionError("opened")
    monkeypatch.setattr("builtins.open", refuse)
    assert len(find_dicom_files(tmp_path)[0]) == 4


@pytest.mark.parametrize("name", ["IM0", "1.2.3", "a.dcm"])
def test_a_file_without_preamble_is_left_to_the_reader_which_names_it(tmp_path, name):
    path = touch(tmp_path / name, b"\x08\0\x60\0\x02\0\0\0CR")
    assert list(find_dicom_files(tmp_path)[0].values()) == [path]
    with pytest.raises(UnreadableImage, match="is not a DICOM file"):
        read_header(path)


@pytest.mark.linux
def test_linked_folders_are_searched_once_and_loops_end(tmp_path):
    data = tmp_path / "data"
    touch(data / "a.dcm")
    touch(tmp_path / "other" / "b.dcm")
    (data / "site").symlink_to("../other")
    (data / "site again").symlink_to("../other")
    (data / "loop").symlink_to(".")
    assert find(data) == ({"a": "a.dcm", "b": "site/b.dcm"}, {})


def test_files_that_share_their_stem_get_their_paths_as_ids(tmp_path, capsys):
    for name in ("p1/IM0", "p2/IM0", "p2/IM1", "IM0.dcm"):
        touch(tmp_path / name)
    assert find(tmp_path) == (
        {"p1/IM0": "p1/IM0", "p2/IM0": "p2/IM0", "IM1": "p2/IM1", "IM0": "IM0.dcm"}, {})
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_files_that_share_their_path_but_for_the_suffix_keep_it(tmp_path):
    touch(tmp_path / "p" / "a.dcm")
    touch(tmp_path / "p" / "a.ima")
    assert find(tmp_path) == ({"p/a.dcm": "p/a.dcm", "p/a.ima": "p/a.ima"}, {})


def test_ids_that_are_still_alike_are_told_apart(tmp_path):
    for name in ("a", "a.dcm", "a.dcm.dcm"):
        touch(tmp_path / name)
    assert find(tmp_path) == ({"a": "a", "a.dcm": "a.dcm.dcm", "a.dcm_": "a.dcm"}, {})


@pytest.mark.linux
def test_names_that_are_alike_only_as_text_are_told_apart(tmp_path):
    for name in (b"f\xf6hn.dcm", rb"f\xf6hn.dcm"):
        touch(tmp_path / os.fsdecode(name))
    assert len(find(tmp_path)[0]) == 2


def test_a_dicomdir_is_neither_an_image_nor_a_warning(tmp_path):
    touch(tmp_path / "DICOMDIR")
    assert find(tmp_path) == ({}, {})


@pytest.mark.linux
def test_bytes_that_are_not_utf8_are_escaped_in_ids(tmp_path):
    touch(tmp_path / os.fsdecode(b"f\xf6hn.dcm"))
    assert list(find(tmp_path)[0]) == [r"f\xf6hn"]


def test_folders_of_results_are_left_out(tmp_path):
    touch(tmp_path / "a.dcm")
    touch(tmp_path / "output" / "b.dcm")
    assert find(tmp_path, tmp_path / "output") == ({"a": "a.dcm"}, {})
    assert find(tmp_path, tmp_path)[0].keys() == {"a", "b"}


def test_a_folder_that_cannot_be_listed_is_skipped_with_the_reason(tmp_path, monkeypatch):
    touch(tmp_path / "a.dcm")
    touch(tmp_path / "locked" / "b.dcm")

    def refuse(path, scandir=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr("os.scandir", refuse)
    assert find(tmp_path) == ({"a": "a.dcm"}, {"locked": "cannot be opened: Permission denied"})


def test_files_of_a_folder_that_may_be_listed_but_not_entered_are_skipped(tmp_path, monkeypatch):
    touch(tmp_path / "a.dcm")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("os.stat", refuse)
    monkeypatch.setattr("os.lstat", refuse)
    monkeypatch.setattr("radiographs.files._walk", lambda *_: [tmp_path / "a.dcm"])
    assert find(tmp_path) == ({}, {"a.dcm": "cannot be opened: Permission denied"})


# What predict.py reads


@pytest.fixture
def formats(tmp_path, write_dicom):
    """Folders `mixed` with a DICOM file and two images, and `images` with two images and a file
    without suffix."""
    for name in ("mixed", "images"):
        (tmp_path / name).mkdir()
        for suffix in ("png", "jpg"):
            Image.fromarray(PIXELS).save(tmp_path / name / f"{suffix}.{suffix}")
    write_dicom(tmp_path / "mixed" / "a.dcm", PIXELS)
    (tmp_path / "images" / "LICENSE").write_text("text")
    return tmp_path


def test_images_beside_dicom_files_are_counted_and_not_read(formats, capsys):
    files, skipped = find_radiographs([formats / "mixed"])
    assert (files.keys(), skipped) == ({"a"}, [])
    assert "so its PNG, JPEG and TIFF files are not read (2)" in capsys.readouterr().out


def test_images_in_a_folder_without_dicom_files_are_read(formats):
    files, _ = find_radiographs([formats / "images"])
    assert files.keys() == {"png", "jpg", "LICENSE"}  # which is skipped when it is read


@pytest.mark.parametrize("name", ["a.jfif", "b.jpe", "c.JFIF"])
def test_jpeg_images_of_all_names_are_found(tmp_path, name):
    Image.fromarray(PIXELS).save(tmp_path / name, "JPEG")
    assert find_radiographs([tmp_path]) == ({name[0]: tmp_path / name}, [])


def test_an_image_of_another_kind_in_a_folder_is_named(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.bmp")
    Image.fromarray(PIXELS).save(tmp_path / "b.gif")
    reasons = [reason for _, reason in find_radiographs([tmp_path])[1]]
    assert reasons == ["is a BMP image, which is not read: save it as PNG",
                       "is a GIF image, which is not read: save it as PNG"]


def test_a_file_that_cannot_be_opened_does_not_end_the_search(formats, monkeypatch):
    locked = touch(formats / "images" / "locked.dcm")

    def refuse(path):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return start_of(path)
    monkeypatch.setattr("radiographs.files.start_of", refuse)
    files, _ = find_radiographs([formats / "images"])
    assert {"png", "jpg"} < files.keys()


def test_files_that_are_named_are_read(formats):
    sources = [formats / "mixed" / "png.png", formats / "mixed" / "a.dcm"]
    files, _ = find_radiographs(sources)
    assert files == {"png": sources[0], "a": sources[1]}


def test_files_that_share_their_names_get_ids_below_the_common_folder(formats):
    sources = [formats / "mixed", formats / "mixed" / "png.png", formats / "images" / "png.png"]
    files, _ = find_radiographs(sources)
    assert files.keys() == {"a", "mixed/png", "images/png"}


def test_a_file_that_is_found_twice_is_read_once(formats):
    files, _ = find_radiographs([formats / "mixed", formats / "mixed" / "a.dcm"])
    assert files.keys() == {"a"}


def test_a_file_that_is_skipped_twice_is_listed_once(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    assert len(find_radiographs([tmp_path, tmp_path])[1]) == 1


def test_pictures_of_an_earlier_run_are_not_searched(formats):
    files, _ = find_radiographs([formats / "images"], [formats / "images" / "png.png"])
    assert files.keys() == {"jpg", "LICENSE"}


def test_a_folder_without_files_holds_nothing(tmp_path):
    assert find_radiographs([tmp_path]) == ({}, [])
