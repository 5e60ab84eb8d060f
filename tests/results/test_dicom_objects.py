"""The DICOM objects as their readers see them: pydicom, highdicom, a validator and an archive."""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import highdicom
import numpy as np
import pytest
from conftest import make_dicom
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset

import predict
from cli import InputError
from metrics import Thresholds
from results.dicom_objects import NOTICE, DicomWriter
from results.drawing import Overlay, draw_overlay

UIDS = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "SOPInstanceUID": "1.2.5"}
THRESHOLDS = Thresholds()


def run(data, checkpoint, output, *flags):
    flags = ["--data", data, "--model", checkpoint, "--output", output, "--dicom", *flags]
    assert predict.main([str(flag) for flag in flags]) == 0
    return output


@pytest.fixture(scope="module")
def output(phantoms, checkpoint, tmp_path_factory):
    """Output for four phantoms."""
    return run(phantoms / "stage_2_test_images", checkpoint, tmp_path_factory.mktemp("output"))


@pytest.fixture
def write_objects(tmp_path):
    """write_objects(dataset, boxes=...) writes the objects of a source and returns the report, the
    capture and what was refused; the first two are None if they were not written."""
    def write(dataset, boxes=(), thresholds=THRESHOLDS):
        path = tmp_path / "source.dcm"
        if isinstance(dataset, bytes):
            path.write_bytes(dataset)
        else:
            dataset.save_as(path, enforce_file_format=True)
        boxes = np.array(boxes, float).reshape(-1, 4)
        overlay = Overlay("a", np.eye(64, dtype=np.uint8), np.full((8, 8), 0.25), boxes,
                          np.full(len(boxes), 0.75), (64, 64), thresholds=thresholds)
        writer = DicomWriter(tmp_path / "dicom", {"a": path}, "0" * 64)
        shutil.rmtree(tmp_path / "dicom", ignore_errors=True)
        writer.write(overlay, draw_overlay(overlay))
        paths = [tmp_path / "dicom" / name for name in ("a.sr.dcm", "a.sc.dcm")]
        return *(dcmread(path) if path.exists() else None for path in paths), writer.refused
    return write


def source(**tags):
    return make_dicom(np.eye(64, dtype=np.uint8), **UIDS | tags)


def texts(report):
    """Names and values of the text items, at any depth."""
    found = []
    for item in report.get("ContentSequence", []):
        if item.ValueType == "TEXT":
            found.append((item.ConceptNameCodeSequence[0].CodeMeaning, item.TextValue))
        found += texts(item)
    return found


def test_boxes_read_back_are_those_of_annotations(output, phantoms):
    annotations = json.loads((output / "annotations.json").read_text())
    assert any(annotations.values())
    for patient_id, string in annotations.items():
        expected = np.array(string.split(), float).reshape(-1, 5)
        image = dcmread(phantoms / "stage_2_test_images" / f"{patient_id}.dcm")
        report = highdicom.sr.ComprehensiveSR.from_dataset(
            dcmread(output / "dicom" / f"{patient_id}.sr.dcm"))
        groups = report.content.get_planar_roi_measurement_groups()
        assert len(groups) == len(expected)
        for group, (confidence, x, y, w, h) in zip(groups, expected):
            low, high = group.roi.value.min(axis=0), group.roi.value.max(axis=0)
            assert np.abs([*low, *high] - np.array([x, y, x + w, y + h])).max() < 0.1
            assert np.array_equal(group.roi.value[0], group.roi.value[-1])
            [measurement] = group.get_measurements()
            assert measurement.value == pytest.approx(100 * confidence, abs=0.01)
            assert (measurement.name.meaning, measurement.unit.value) == ("Probability", "%")
            assert (group.finding_type.scheme_designator, group.finding_type.meaning,
                    group.finding_sites[0].value.meaning) == ("SCT", "Opacity", "Lung")
            reference = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
            assert reference.ReferencedSOPInstanceUID == image.SOPInstanceUID
        assert report.get_evidence() == [(image.StudyInstanceUID, image.SeriesInstanceUID,
                                          image.SOPInstanceUID, image.SOPClassUID)]


def test_a_report_names_its_thresholds_and_its_maker_and_is_unverified(write_objects):
    report, _, _ = write_objects(source(), boxes=[[1, 2, 3, 4], [5, 6, 7, 8]])
    assert report.VerificationFlag == "UNVERIFIED"
    found = texts(report)
    assert ("Device Observer Serial Number", "0" * 64) in found
    assert ("Device Observer Name", "PyTorch Pneumonia Detection") in found
    assert ("Algorithm Parameters", str(THRESHOLDS)) in found
    assert ("Comment", NOTICE) in found and ("Comment", "Opacities found: 2") in found
    content = highdicom.sr.ComprehensiveSR.from_dataset(report).content
    [group] = content.get_image_measurement_groups()
    assert group.get_measurements()[0].value == 25
    *_, measurements = report.ContentSequence
    first, *_ = measurements.ContentSequence  # without a region there, dwv shows none
    assert "SCOORD" in [item.ValueType for item in first.ContentSequence]


def test_a_report_without_boxes_says_so(write_objects):
    report, _, _ = write_objects(source())
    content = highdicom.sr.ComprehensiveSR.from_dataset(report).content
    assert not content.get_planar_roi_measurement_groups()
    [group] = content.get_image_measurement_groups()
    assert group.get_qualitative_evaluations()[0].value.meaning == "Absent"
    assert ("Comment", "No opacity found") in texts(report)
    assert group.source_images[0].referenced_sop_instance_uid == UIDS["SOPInstanceUID"]


def test_a_capture_is_the_picture_in_colour(output):
    for path in (output / "dicom").glob("*.sc.dcm"):
        picture = Image.open(output / "images" / path.name.replace(".sc.dcm", ".png"))
        capture = dcmread(path)
        assert np.array_equal(capture.pixel_array, picture.convert("RGB"))
        assert (capture.ImageComments, capture.BurnedInAnnotation) == (NOTICE, "YES")


def test_each_object_is_a_series_of_its_own_in_the_study_of_its_source(write_objects):
    image = source(PatientID="p1", PatientName="A^B", AccessionNumber="7", StudyDate="20200102")
    report, capture, _ = write_objects(image)
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber", "StudyDate"):
        assert image[keyword].value == report[keyword].value == capture[keyword].value
    series = {dataset.SeriesInstanceUID for dataset in (image, report, capture)}
    assert len(series) == 3


def test_what_a_source_lacks_is_empty(write_objects):
    for dataset in write_objects(source())[:2]:
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "StudyDate", "StudyTime",
                        "StudyID", "AccessionNumber", "ReferringPhysicianName"):
            assert not dataset[keyword].value, keyword
    assert not write_objects(source())[1]["PatientOrientation"].value


def test_a_second_run_replaces_the_first(write_objects):
    first, again = (write_objects(source(), [[1, 2, 3, 4]]) for _ in range(2))
    assert first[1] == again[1]
    for dataset in (first[0], again[0]):
        del dataset.ContentDate, dataset.ContentTime
    assert first[0] == again[0]
    for other in (write_objects(source(), thresholds=THRESHOLDS._replace(box=0.4)),
                  write_objects(source(SOPInstanceUID="1.2.6"))):
        assert first[0].SOPInstanceUID != other[0].SOPInstanceUID
        assert first[1].SeriesInstanceUID != other[1].SeriesInstanceUID
    for dataset in first[:2]:
        assert dataset.SOPInstanceUID.startswith("1.2.826.0.1.3680043.10.511.3.")


@pytest.mark.parametrize("charset, name", [
    ("ISO_IR 100", "Müller^Jörg"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    ("GB18030", "王^小东")])
def test_names_in_any_character_set_are_kept(write_objects, charset, name):
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID = "x", name.replace("^", " ").replace("=", " ")
    image = source(SpecificCharacterSet=charset, PatientName=name, OtherPatientIDsSequence=[other])
    for dataset in write_objects(image)[:2]:
        assert dataset.PatientName == name
        assert dataset.OtherPatientIDsSequence[0].IssuerOfPatientID == other.IssuerOfPatientID


def test_a_file_with_several_frames_is_referred_to_by_its_first(write_objects):
    report, capture, _ = write_objects(source(NumberOfFrames=2, PixelData=bytes(2 * 64 * 64)))
    assert capture.SourceImageSequence[0].ReferencedFrameNumber == 1
    assert "NumberOfFrames" not in report and "NumberOfFrames" not in capture


@pytest.mark.parametrize("tags, reason", [
    ({"StudyInstanceUID": None}, "has no valid StudyInstanceUID"),
    ({"SOPInstanceUID": "no UID", "SeriesInstanceUID": ""},
     "has no valid SeriesInstanceUID, SOPInstanceUID"),
    ({"SOPClassUID": "1.2.3.4"}, "has no valid SOPClassUID")])
def test_a_source_without_the_uids_gets_none(write_objects, tags, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of the values above
        report, capture, [line] = write_objects(source(PatientID="p1", **tags))
    assert report is capture is None and line.endswith(f"source.dcm {reason}")


def test_other_files_get_none_and_are_named_in_a_line(tmp_path, checkpoint, capsys):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.eye(64, dtype=np.uint8) * 200).save(tmp_path / "data" / "a.png")
    source(PatientID="p1", StudyInstanceUID=None).save_as(
        tmp_path / "data" / "b.dcm", enforce_file_format=True)
    files = tmp_path / "data" / "a.png", tmp_path / "data" / "b.dcm"
    flags = ["--model", checkpoint, "--output", tmp_path / "output", "--dicom", "--no-save-images"]
    assert predict.main([str(flag) for flag in ("--data", *files, *flags)]) == 0
    assert f"warning: images get no DICOM objects (2): {files[0]} is not a DICOM file, " \
        f"{files[1]} has no valid StudyInstanceUID\n" in capsys.readouterr().out
    assert not (tmp_path / "output" / "dicom").exists()


def test_objects_are_not_input(tmp_path, checkpoint):
    source().save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for _ in range(2):
        run(tmp_path, checkpoint, tmp_path, "--no-save-images")
    assert json.loads((tmp_path / "annotations.json").read_text()).keys() == {"a"}
    assert not (tmp_path / "images").exists()


def test_without_highdicom_the_remedy_is_named(tmp_path, checkpoint, monkeypatch):
    source().save_as(tmp_path / "a.dcm", enforce_file_format=True)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.delitem(sys.modules, "results.dicom_objects")
    with pytest.raises(InputError, match="highdicom is missing: pip install -r requirements-extra"):
        run(tmp_path / "a.dcm", checkpoint, tmp_path)


VALUES = [b"", b"\0", b"\\", b"99999999", b"\xff\xfe", b"\x1b$B;3", b"1.2.3", b"=^=^=", b"X" * 300]


def test_hostile_headers_give_objects_or_a_line(write_objects, tmp_path, recwarn):
    image = source(PatientID="p1", PatientName="A^B", SpecificCharacterSet="ISO_IR 100",
                   StudyDate="20200102", StudyTime="101010", PatientBirthDate="19700101",
                   OtherPatientIDsSequence=[Dataset()], PatientOrientation=["L", "F"])
    image.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    original = (tmp_path / "image.dcm").read_bytes()
    generator, outcomes = random.Random(0), set()
    for _ in range(60):
        content = bytearray(original)
        start = generator.randrange(132, len(original) - 64 * 64)
        value = generator.choice(VALUES + [generator.randbytes(4)])
        content[start:start + generator.choice([0, len(value)])] = value
        report, capture, refused = write_objects(bytes(content))
        assert (report is None) == (capture is None) == bool(refused)
        assert all("\n" not in line and "Traceback" not in line for line in refused)
        outcomes.add(bool(refused))
    assert outcomes == {True, False}
    assert not [str(warning.message) for warning in recwarn if "dicom_objects" in warning.filename]


# Programs of others


def validate(path):
    """The errors that dciodvfy finds."""
    result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace")
    return {line for line in (result.stdout + result.stderr).splitlines()
            if line.startswith("Error")}


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's package dicom3tools")
def test_a_validator_finds_no_errors_but_the_sources_own(output, phantoms):
    paths = sorted((output / "dicom").iterdir())
    assert len(paths) == 8
    for path in paths:
        image = phantoms / "stage_2_test_images" / f"{path.name[:-7]}.dcm"
        assert validate(path) <= validate(image)


@pytest.mark.skipif(not shutil.which("dsrdump"), reason="needs Debian's package dcmtk")
def test_a_report_can_be_read(output):
    for path in (output / "dicom").glob("*.sr.dcm"):
        result = subprocess.run(["dsrdump", "+Pl", path], capture_output=True, text=True)
        assert result.returncode == 0 and "E: " not in result.stderr
        assert '"Finding")=(128305008,SCT,"Opacity")' in result.stdout
        assert re.search(rf'"Comment"\)="{NOTICE}"', result.stdout)


class Archive:
    """Orthanc on the loopback, with its files in `folder`."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {"StorageDirectory": str(folder / "storage"), "HttpPort": port, "Plugins": [],
                    "IndexDirectory": str(folder / "index"), "DicomServerEnabled": False,
                    "RemoteAccessAllowed": False, "AuthenticationEnabled": False}
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.process = subprocess.Popen(["Orthanc", folder / "orthanc.json"], cwd=folder,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                self.get("/system")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("Orthanc does not answer")

    def get(self, path, body=None):
        with urllib.request.urlopen(self.url + path, body, timeout=60) as response:
            content = response.read()
            is_json = response.headers["Content-Type"].startswith("application/json")
            return json.loads(content) if is_json else content


@pytest.fixture
def archive(tmp_path):
    if not shutil.which("Orthanc"):
        pytest.skip("needs Debian's package orthanc")
    archive = Archive(tmp_path)
    yield archive
    archive.process.terminate()
    archive.process.wait(30)


def test_an_archive_shows_three_series_of_one_study(archive, output, phantoms, tmp_path):
    annotations = json.loads((output / "annotations.json").read_text())
    patient_id = max(annotations, key=lambda key: len(annotations[key]))
    paths = [phantoms / "stage_2_test_images" / f"{patient_id}.dcm",
             *(output / "dicom" / f"{patient_id}.{kind}.dcm" for kind in ("sr", "sc"))]
    for _ in range(2):
        stored = [archive.get("/instances", path.read_bytes()) for path in paths]
        counts = archive.get("/statistics")
        assert [counts[f"Count{level}"] for level in ("Patients", "Studies", "Series", "Instances")
                ] == [1, 1, 3, 3]
    assert [answer["Status"] for answer in stored] == ["AlreadyStored"] * 3

    (tmp_path / "preview.png").write_bytes(archive.get(f"{stored[2]['Path']}/preview"))
    picture = Image.open(output / "images" / f"{patient_id}.png").convert("RGB")
    assert np.array_equal(Image.open(tmp_path / "preview.png").convert("RGB"), picture)

    report = dcmread(paths[1])
    [study] = report.CurrentRequestedProcedureEvidenceSequence
    [series] = study.ReferencedSeriesSequence
    [reference] = series.ReferencedSOPSequence
    for uid, path in ((study.StudyInstanceUID, "study"), (series.SeriesInstanceUID, "series"),
                      (reference.ReferencedSOPInstanceUID, "instance")):
        [found] = archive.get("/tools/lookup", uid.encode())
        assert found["Type"].lower() == path
    assert found["ID"] == stored[0]["ID"]


def test_an_archive_replaces_what_a_second_run_stores(archive, write_objects, tmp_path):
    changed = THRESHOLDS._replace(box=0.4)
    for thresholds, series in ((THRESHOLDS, 3), (THRESHOLDS, 3), (changed, 5)):
        write_objects(source(PatientID="p1"), thresholds=thresholds)
        for path in (tmp_path / "source.dcm", *(tmp_path / "dicom").iterdir()):
            archive.get("/instances", path.read_bytes())
        assert archive.get("/statistics")["CountSeries"] == series
