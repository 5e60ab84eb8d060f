"""Puts results into DICOM objects, which picture archives store and their viewers show.

For a DICOM image, <id>.sr.dcm is a structured report (Comprehensive SR, TID 1500 of DICOM PS3.16)
with each box as a region of the image, and <id>.sc.dcm is a secondary capture of the picture as
drawn, since every viewer shows it and few show regions. Each is a new series of the image's study.

UIDs are derived: the same image, weights and thresholds give the same ones, so that in an archive
a second run replaces the first. All that differs then is the date and time in the report.
"""

import io
import warnings
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ComprehensiveSRStorage, generate_uid

from cli import VERSION, InputError
from metrics import image_confidence
from radiographs import UnreadableImage, decoding_errors

from .drawing import Overlay, picture_path, save_file

try:
    from highdicom import SOPClass, sc, sr
except ImportError as error:
    raise InputError(f"{error.name} is missing: pip install -r requirements-extra.txt") from None

PROGRAM = "PyTorch Pneumonia Detection"
NOTICE = "For illustration and learning only"
# SNOMED CT's "abnormally opaque structure"; with the finding site it says opacity of the lung
OPACITY = sr.CodedConcept("128305008", "SCT", "Opacity")
ROOT = "1.2.826.0.1.3680043.10.511.3."  # highdicom's, for UIDs
REFERENCE = "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"
_reading = Lock()  # settings on warnings are those of all threads


class Result(NamedTuple):
    """What was found in one DICOM image."""
    source: Dataset  # of read_source
    overlay: Overlay
    digest: str  # of the checkpoint

    def uid(self, name: str) -> str:
        """The UID of the object, or part of it, with this name."""
        parts = [self.source[keyword].value for keyword in REFERENCE]
        parts += [self.digest, *self.overlay.thresholds._replace(source=""), name]
        return generate_uid(ROOT, ["|".join(map(str, parts))])

    def reference(self) -> tuple[str, str, list[int] | None]:
        """SOP class and UID of the source, and the number of its frame if it has several."""
        frames = [1] if (self.source.get("NumberOfFrames") or 1) > 1 else None
        return self.source.SOPClassUID, self.source.SOPInstanceUID, frames


class DicomWriter:
    """Writes the objects of the images `files` {patient_id: path} to `folder`; threads may share
    it. `digest` is the SHA-256 of the checkpoint, in hexadecimal. `refused` gets a line for each
    image that gets no objects."""

    def __init__(self, folder: Path, files: dict[str, Path], digest: str):
        self.folder, self.files, self.digest, self.refused = folder, files, digest, []

    def write(self, overlay: Overlay, picture: Image.Image) -> None:
        """Writes the report on a predicted image, and the secondary capture of its picture."""
        path = self.files[overlay.patient_id]
        try:
            result = Result(read_source(path), overlay, self.digest)
        except UnreadableImage as error:
            self.refused.append(f"{path} {error}")
            return
        target = picture_path(self.folder, overlay.patient_id)
        save_file(target.with_suffix(".sr.dcm"), build_report(result).save_as)
        save_file(target.with_suffix(".sc.dcm"), build_capture(result, picture).save_as)


def read_source(path: Path) -> Dataset:
    """The UIDs of a DICOM image, and what it says of patient and study, checked to be encodable.
    Raises UnreadableImage if the file is of another kind, or its header cannot be used."""
    with _reading, warnings.catch_warnings(), decoding_errors():
        warnings.simplefilter("ignore")
        header = dcmread(path, stop_before_pixels=True)
        header.decode()
        invalid = [name for name in REFERENCE if not UID(str(header.get(name) or "")).is_valid]
        if invalid or header.SOPClassUID.is_private:
            raise UnreadableImage(f"has no valid {', '.join(invalid) or 'SOPClassUID'}")
        study, series, instance, kind = (header[name].value for name in REFERENCE)
        source = SOPClass(study, series, 1, instance, kind, 1, modality="")
        source.copy_patient_and_study_information(header)
        source.SpecificCharacterSet = "ISO_IR 192"  # UTF-8
        source.PatientOrientation, source.NumberOfFrames = map(
            header.get, ("PatientOrientation", "NumberOfFrames"))
        source.save_as(io.BytesIO())
        return source


def build_report(result: Result) -> Dataset:
    """The structured report: a group for each box, and one on the whole image."""
    boxes, thresholds = len(result.overlay.boxes), str(result.overlay.thresholds)
    device = sr.DeviceObserverIdentifyingAttributes(
        generate_uid(ROOT, [VERSION, result.digest]), PROGRAM, None, VERSION, result.digest)
    context = sr.ObservationContext(None, sr.ObserverContext(codes.DCM.Device, device))
    presence = codes.SCT.Present if boxes else codes.SCT.Absent
    image = sr.MeasurementsAndQualitativeEvaluations(
        sr.TrackingIdentifier(result.uid("image"), "image"),
        algorithm_id=sr.AlgorithmIdentification(PROGRAM, VERSION, [thresholds]),
        qualitative_evaluations=[sr.QualitativeEvaluation(codes.DCM.PresenceOfProperty, presence)],
        source_images=[sr.SourceImageForMeasurementGroup(*result.reference())],
        **_finding(image_confidence(result.overlay.mask), codes.SCT.Maximum))
    for text in (f"Opacities found: {boxes}" if boxes else "No opacity found", NOTICE):
        image[0].ContentSequence.append(sr.TextContentItem(codes.DCM.Comment, text, "CONTAINS"))
    # boxes first: dwv shows regions only if there is one in the first group
    content = sr.MeasurementReport(context, codes.SCT.PlainRadiography, [*_boxes(result), image])
    report = _build(SOPClass, result, 9001, sop_class_uid=ComprehensiveSRStorage, modality="SR")
    report.CompletionFlag, report.VerificationFlag = "COMPLETE", "UNVERIFIED"
    report.PerformedProcedureCodeSequence = report.ReferencedPerformedProcedureStepSequence = []
    report.ContentSequence = []  # for the next line, which takes long to look for references
    report.CurrentRequestedProcedureEvidenceSequence, _ = sr.utils.collect_evidence(
        [result.source], report, report.StudyInstanceUID)
    report.update(content[0])
    return report


def _boxes(result):
    """The outline of each box on the source, and its probability."""
    overlay = result.overlay
    for number, ((x, y, w, h), confidence) in enumerate(zip(overlay.boxes, overlay.confidences), 1):
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]])
        yield sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            sr.TrackingIdentifier(result.uid(f"box {number}"), f"box {number}"),
            sr.ImageRegion("POLYLINE", corners, sr.SourceImageForRegion(*result.reference())),
            **_finding(confidence, codes.SCT.Mean))


def _finding(probability, kind):
    """Arguments of a group: opacity of the lung, and its probability over the pixels in percent."""
    percent = round(100 * float(probability), 2), codes.UCUM.Percent
    return {"finding_type": OPACITY, "finding_sites": [sr.FindingSite(codes.SCT.Lung)],
            "measurements": [sr.Measurement(codes.DCM.Probability, *percent, derivation=kind)]}


def build_capture(result: Result, picture: Image.Image) -> Dataset:
    """The secondary capture of a picture: RGB without compression, which every viewer reads."""
    capture = _build(
        sc.SCImage, result, 9002, pixel_array=np.asarray(picture.convert("RGB")), bits_allocated=8,
        photometric_interpretation="RGB", coordinate_system="PATIENT",
        patient_orientation=("L", "F"))  # replaced below
    del capture.ContentDate, capture.ContentTime, capture.ContributingEquipmentSequence
    del capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture
    capture["PatientOrientation"], capture.Laterality = result.source["PatientOrientation"], None
    capture.BurnedInAnnotation, capture.ImageComments = "YES", NOTICE  # the id is burned in
    capture.SourceImageSequence = sr.SourceImageForRegion(*result.reference()).ReferencedSOPSequence
    return capture


def _build(kind, result, number, **arguments):
    """An object of a `kind` of highdicom's, as a series of its own in the source's study."""
    dataset = kind(
        study_instance_uid=result.source.StudyInstanceUID, sop_instance_uid=result.uid(f"{number}"),
        series_instance_uid=result.uid(f"series {number}"), series_number=number, instance_number=1,
        manufacturer=PROGRAM, software_versions=VERSION, device_serial_number=result.digest,
        series_description=f"Lung opacities. {NOTICE}", **arguments)
    dataset.copy_patient_and_study_information(result.source)
    dataset.SpecificCharacterSet = result.source.SpecificCharacterSet
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime
    return dataset
