import gzip
import json
import os
import signal
import zipfile

import numpy as np
import pandas as pd
import pytest

import data_processing as dp
from cli import InputError, InternalError
from data_processing import read_boxes, read_labels, read_table

PIXELS = np.zeros((8, 8), np.uint8)
LABELS = "patientId,x,y,width,height,Target\na,1,2,3,4,1\na,5,1,2,2,1\nb,,,,,0\nc,,,,,0\n"
CLASSES = ("patientId,class\na,Lung Opacity\na,Lung Opacity\nb,Normal\n"
           "c,No Lung Opacity / Not Normal\n")
TRAINING_COLUMNS = ("patientId,PatientSex,PatientAge,ViewPosition,x,y,width,height,Target,class,"
                    "patient")


@pytest.fixture
def study(tmp_path, write_dicom):
    """Three labelled images in tmp_path/images and their tables in tmp_path."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        write_dicom(tmp_path / "images" / f"{name}.dcm", PIXELS)
    (tmp_path / "stage_2_train_labels.csv").write_text(LABELS)
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(CLASSES)
    return tmp_path


def build(study, labels=None):
    """The training table, after `labels` took the place of the label table."""
    if labels is not None:
        (study / "stage_2_train_labels.csv").write_text(labels)
    return dp.build_training_csv(study / "images", study, study)


def test_training_csv_has_one_row_per_label_row(study):
    build(study)
    table = pd.read_csv(study / "train.csv")
    assert list(table) == TRAINING_COLUMNS.split(",")
    assert table["patientId"].tolist() == ["a", "a", "b", "c"]


def test_a_row_joins_label_header_and_class(study):
    build(study)
    row = pd.read_csv(study / "train.csv").loc[1]
    assert row[["x", "y", "width", "height", "Target"]].tolist() == [5, 1, 2, 2, 1]
    assert (row["PatientAge"], row["class"]) == (62, "Lung Opacity")


def test_each_image_has_its_class_and_target(study):
    build(study)
    table = pd.read_csv(study / "train.csv")
    assert table["class"].tolist()[1:] == ["Lung Opacity", "Normal", "No Lung Opacity / Not Normal"]
    assert table["Target"].tolist() == [1, 1, 0, 0]


def test_a_complete_study_is_joined_without_a_warning(study, capsys):
    build(study)
    assert "warning" not in capsys.readouterr().out


def test_predict_csv_has_one_row_per_image(study):
    dp.main(["--type", "prediction", "--images", str(study / "images"), "--output", str(study)])
    assert (study / "predict.csv").read_text().splitlines()[:2] == [
        "patientId,PatientSex,PatientAge,ViewPosition", "a,F,62,PA"]


@pytest.mark.parametrize("value, age", [
    ("62", 62), ("062Y", 62), ("006M", 0.5), ("151", None), ("120", None), ("119", 119),
    ("", None), (None, None), ("old", None)])
def test_ages_become_years_and_unreadable_or_impossible_ones_nothing(value, age):
    assert dp._age(value) == age


def test_missing_tags_are_empty_cells(study, write_dicom):
    write_dicom(study / "images" / "b.dcm", PIXELS, PatientAge=None, PatientSex="",
                ViewPosition=None)
    build(study)
    assert "b,,,,,,,,0,Normal,b" in (study / "train.csv").read_text().splitlines()


def test_an_image_without_a_label_is_left_out_and_named(study, write_dicom, capsys):
    write_dicom(study / "images" / "d.dcm", PIXELS)
    assert build(study)["patientId"].tolist() == ["a", "a", "b", "c"]
    assert "images without labels are left out (1): d" in capsys.readouterr().out


def test_a_label_without_an_image_is_left_out_and_named(study, capsys):
    (study / "images" / "c.dcm").unlink()
    assert build(study)["patientId"].tolist() == ["a", "a", "b"]
    assert "labels without an image are left out (1): c" in capsys.readouterr().out


def test_files_that_are_not_dicom_are_left_out_and_named_with_their_reasons(study, capsys):
    (study / "images" / "notes.txt").write_text("no DICOM")
    (study / "images" / "gone.dcm").symlink_to("nowhere")
    assert build(study)["patientId"].tolist() == ["a", "a", "b", "c"]
    out = capsys.readouterr().out
    assert "files are left out (2): " in out
    assert "notes.txt is not a DICOM file" in out and "gone.dcm is a link to nothing" in out


def test_labels_and_images_without_a_common_id_are_refused(study):
    with pytest.raises(InputError, match="no image in .* has a label in .*--images and --labels"):
        build(study, LABELS.splitlines()[0] + "\nd,,,,,0\n")


def test_a_broken_label_table_leaves_no_training_table(study):
    with pytest.raises(InputError, match="labels.csv, line 4: Target '2' is neither 0 nor 1"):
        build(study, LABELS.replace("b,,,,,0", "b,,,,,2"))
    assert not (study / "train.csv").exists()


def test_an_image_of_two_classes_is_refused(study):
    path = study / "stage_2_detailed_class_info.csv"
    path.write_text(CLASSES.replace("a,Lung Opacity\nb", "a,Normal\nb"))
    with pytest.raises(InputError, match="info.csv, line 3: patientId 'a' has two different cl"):
        build(study)


def test_boxes_outside_the_image_are_named(study, capsys):
    build(study, LABELS.replace("a,5,1,2,2,1", "a,5,1,20,2,1"))
    out = capsys.readouterr().out
    assert "boxes reach beyond their image and are clipped in training (1): a" in out


def test_boxes_outside_their_image_are_dropped_with_an_image_left_without_a_box(study, capsys):
    labels = LABELS.replace("a,5,1,2,2,1", "a,8,1,2,2,1").replace("b,,,,,0", "b,-3,0,3,4,1")
    table = build(study, labels)
    assert table["patientId"].tolist() == ["a", "c"] and table["x"].tolist()[0] == 1
    out = capsys.readouterr().out
    assert "boxes lie outside their image" in out and "without a box (2): a, b" in out


@pytest.mark.parametrize("rows", [[8, 8], b"\x08\0", "eight", None])
def test_a_size_that_is_not_a_number_costs_no_row(study, monkeypatch, rows):
    monkeypatch.setattr(dp, "_header_row", lambda path: dict.fromkeys(dp.HEADER_COLUMNS[1:]) | {
        "Rows": rows if path.stem == "b" else 8, "Columns": 8})
    assert build(study)["patientId"].tolist() == ["a", "a", "b", "c"]


def test_a_failed_write_leaves_the_old_table(study, monkeypatch):
    build(study)
    before = (study / "train.csv").read_bytes()

    def break_off(self, file, **options):
        file.write(b"half a li")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_csv", break_off)
    with pytest.raises(OSError):
        build(study)
    assert (study / "train.csv").read_bytes() == before
    assert not list(study.glob(".*"))


def test_a_crash_in_a_header_costs_one_file(study, monkeypatch, capsys):
    def read(path, read_header=dp.read_header):
        if path.stem == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_header(path)
    monkeypatch.setattr(dp, "read_header", read)
    assert build(study)["patientId"].tolist() == ["a", "a", "c"]
    assert "b.dcm crashed its decoder" in capsys.readouterr().out


def fail_on(names, monkeypatch):
    def read(path, read_header=dp.read_header):
        return read_header(path) if path.stem not in names else None.mistake
    monkeypatch.setattr(dp, "read_header", read)


@pytest.mark.parametrize("kind", ["training", "prediction"])
def test_an_internal_error_costs_its_file_and_ends_with_status_1(study, monkeypatch, capfd, kind):
    fail_on("b", monkeypatch)
    flags = ["--images", study / "images", "--labels", study, "--output", study, "--type", kind]
    assert dp.main([str(flag) for flag in flags]) == 1
    table = pd.read_csv(study / {"training": "train.csv", "prediction": "predict.csv"}[kind])
    assert set(table["patientId"]) == {"a", "c"}
    output = capfd.readouterr()
    assert output.err.count("Traceback") == 1
    assert "b.dcm was not read because of an internal error" in output.out


def test_internal_errors_alone_are_not_blamed_on_the_folder(study, monkeypatch):
    fail_on("abc", monkeypatch)
    with pytest.raises(InternalError):
        dp.read_headers(study / "images")


def test_a_file_name_in_latin_1_costs_nothing(study, write_dicom):
    write_dicom(study / "images" / os.fsdecode(b"f\xf6hn.dcm"), PIXELS)
    dp.build_prediction_csv(study / "images", study)
    ids = pd.read_csv(study / "predict.csv")["patientId"].tolist()
    assert ids == ["a", "b", "c", r"f\xf6hn"]


def test_a_zip_file_is_named_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.dcm", b"")
    with pytest.raises(InputError, match="images.zip is a zip file, not the folder.*--images"):
        dp.main(["--images", str(tmp_path / "images.zip"), "--output", str(tmp_path)])


def test_missing_folder_is_named_with_flag_and_variable(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist.*--images.*TRAINML_DATA_PATH"):
        dp.main(["--images", str(tmp_path / "nowhere"), "--output", str(tmp_path)])


# Label tables


@pytest.fixture
def path(tmp_path):
    """A label table of one image with two boxes and two without any."""
    path = tmp_path / "labels.csv"
    path.write_text(LABELS)
    return path


@pytest.mark.parametrize("old, new, message", [
    ("a,1,2,3,4,1", "a,1,,3,4,1", "line 2: y 'nan' is missing though Target is 1"),
    ("a,5,1,2,2,1", "a,5,1,-2,2,1", "line 3: width '-2.0' is not above 0"),
    ("a,5,1,2,2,1", "a,5,1,2,0,1", "line 3: height '0.0' is not above 0"),
    ("a,5,1,2,2,1", "a,five,1,2,2,1", "line 3: x 'five' is not a finite number"),
    ("a,5,1,2,2,1", "a,inf,1,2,2,1", "line 3: x 'inf' is not a finite number"),
    ("a,5,1,2,2,1", "a,five,1,2,two,one", "line 3: x 'five' is not a finite number"),
    ("b,,,,,0", "b,,,,,2", "line 4: Target '2' is neither 0 nor 1"),
    ("b,,,,,0", ",,,,,0", "line 4: patientId '' is empty"),
    ("width", "breadth", "has no column width"),
    (LABELS, "", "cannot be read as a table"),
    (LABELS, LABELS.splitlines()[0], "has no rows"),
    ("a,5,1,2,2,1", "\na,5,1,2,2,1,7", "Expected 6 fields in line 4, saw 7"),
])
def test_broken_tables_name_file_line_and_value(path, old, new, message):
    assert old in LABELS
    path.write_text(LABELS.replace(old, new))
    with pytest.raises(InputError) as error:
        read_boxes(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(path):
    expected = read_boxes(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read_boxes(path), expected)


def test_exact_repeats_of_a_row_are_dropped_and_counted(path, capsys):
    expected = read_boxes(path)
    path.write_text(LABELS + "a,1.0,2,3,4,1\nb,,,,,0\n")
    pd.testing.assert_frame_equal(read_boxes(path), expected)
    assert f"rows of {path} repeat others and are dropped (2): a, b" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [slice(1, None), slice(2, 3), slice(0, None)])
def test_commas_at_the_end_of_rows_change_nothing(path, rows):
    expected = read_boxes(path)
    lines = LABELS.splitlines()
    lines[rows] = [line + "," for line in lines[rows]]
    path.write_text("\n".join(lines))
    pd.testing.assert_frame_equal(read_boxes(path), expected)


def test_commas_at_the_end_of_rows_of_text_change_nothing(path):
    path.write_text("patientId,class\na,Normal,\nb,Lung Opacity\n")
    assert read_table(path, ["patientId", "class"])["class"].tolist() == ["Normal", "Lung Opacity"]


def test_boxes_as_shares_of_the_image_are_refused(path):
    head, *_, b, c = LABELS.splitlines()
    path.write_text("\n".join([head, "a,0.5,0.25,0.2,1,1", b, c]))
    with pytest.raises(InputError, match="no box of 2 pixels.*not as shares of the image"):
        read_boxes(path)


@pytest.mark.parametrize("content, words", [
    (b"PK\x03\x04" + bytes(200), "a zip archive"), (gzip.compress(LABELS.encode()), "a gzip file"),
    (LABELS.encode("utf-16"), "UTF-16 text"), (LABELS.encode("utf-16-le"), "UTF-16 text")])
def test_another_kind_of_file_named_csv_is_named(path, content, words):
    path.write_bytes(content)
    message = f"labels.csv is {words}.*not a table: save it as CSV in UTF-8"
    with pytest.raises(InputError, match=message):
        read_boxes(path)


def test_labels_are_boxes_and_views_by_id(path):
    path.write_text("patientId,ViewPosition,x,y,width,height,Target\na,AP,1,2,3,4,1\n"
                    "a,AP,5,1,2,2,1\nb,PA,,,,,0\n")
    boxes, views, _ = read_labels(path)
    assert {key: value.tolist() for key, value in boxes.items()} == {
        "a": [[1, 2, 3, 4], [5, 1, 2, 2]], "b": []}
    assert views == {"a": "AP", "b": "PA"}


def test_labels_of_the_challenge_have_no_views(path):
    boxes, views, patients = read_labels(path)
    assert boxes["b"].shape == (0, 4) and views == {"a": "", "b": "", "c": ""} and not patients


def test_a_cell_of_the_table_names_the_patient_and_an_empty_one_nobody(path):
    path.write_text("patientId,x,y,width,height,Target,patient\na,1,2,3,4,1,Mr. X\nb,,,,,0,\n")
    labels = read_labels(path)
    assert labels.patients == {"a": "Mr. X"} and labels.patient_of("b") == "b"


@pytest.mark.parametrize("text", [
    "patientId;x;y;width;height;Target\na;1,5;2,0;3;4;1\nb;;;;;0\n",
    "patientId\tx\ty\twidth\theight\tTarget\na\t1.5\t2\t3\t4\t1\nb\t\t\t\t\t0\n",
    "sep=;\r\npatientId;x;y;width;height;Target\r\na;1,5;2;3;4;1\r\nb;;;;;0;;\r\n",
    "sep=,\npatientId,x,y,width,height,Target\na,1.5,2,3,4,1\nb,,,,,0\n"])
def test_tables_as_excel_writes_them_in_europe_are_read(path, text):
    path.write_bytes(text.encode("utf-8-sig"))
    boxes = read_labels(path).boxes
    assert boxes["a"].tolist() == [[1.5, 2, 3, 4]] and len(boxes["b"]) == 0


def test_a_row_that_is_too_long_is_named_by_its_line(path):
    path.write_text(LABELS + "d,1,2,3,4,1,7\n")
    with pytest.raises(InputError, match="cannot be read as a table: Expected 6 fields in line 6"):
        read_labels(path)


@pytest.mark.parametrize("row, message", [
    ("d,1,2,3,4,0", "line 6: Target '0' is 0, but the row has a box"),
    ("b,1,2,3,4,1", "line 4: patientId 'b' has rows of both targets")])
def test_rows_that_contradict_themselves_are_refused(path, row, message):
    path.write_text(f"{LABELS}{row}\n")
    with pytest.raises(InputError, match=message):
        read_labels(path)


SIZES = {name: (256, 256) for name in "abcdef"}


@pytest.mark.parametrize("box", [[400, 300, 200, 300], [150, 150, 200, 220], [-90, 10, 50, 50]])
def test_boxes_in_other_pixels_or_of_another_form_than_the_images_are_refused(box):
    boxes = {name: np.array([box], float) for name in SIZES}
    message = "the boxes of 6 of 6 images .*in 256 x 256 pixels: give x"
    with pytest.raises(InputError, match=message):
        dp.check_boxes(boxes, SIZES)


def test_few_boxes_beyond_their_image_are_named_and_some_pixels_are_nothing(capsys):
    boxes = {name: np.array([[150, 150, 110, 110]], float) for name in SIZES}
    dp.check_boxes(boxes, SIZES)
    assert capsys.readouterr().out == ""
    dp.check_boxes(boxes | {"a": np.array([[150, 150, 150, 110.]])}, SIZES)
    assert "beyond their image (1): a: [[150, 150, 150, 110]]" in capsys.readouterr().out


def test_boxes_in_the_pixels_of_smaller_images_get_a_warning(capsys):
    dp.check_boxes({name: np.array([[30, 40, 50, 60.]]) for name in SIZES}, SIZES)
    assert "upper left quarter" in capsys.readouterr().out


def test_a_folder_without_dicom_files_gives_an_empty_table_and_says_so(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    flags = ["--type", "prediction", "--images", str(tmp_path), "--output", str(tmp_path)]
    assert dp.main(flags) == 0
    assert (tmp_path / "predict.csv").read_text().startswith("patientId,PatientSex")
    assert "no DICOM file in" in capsys.readouterr().out


# Patients


def patients_of(names, known=()):
    """{patientId: patient} of images a, b, ... with these PatientIDs."""
    ids = [chr(ord("a") + index) for index in range(len(names))]
    headers = pd.DataFrame({"patientId": ids, "PatientID": names})
    return dict(zip(ids, dp.find_patients(headers, dict(known))))


def test_a_patient_id_that_names_several_images_is_the_patient(capsys):
    assert patients_of(["P1", "P2", "P1", None]) == {"a": "P1", "b": "b", "c": "P1", "d": "d"}
    out = capsys.readouterr().out
    assert "4 images of 3 patients: 2 images with a PatientID that names several" in out
    assert "P1" not in out


def test_a_patient_id_that_all_images_share_is_no_patient(capsys):
    assert patients_of(["ANON", "ANON", "ANON"]) == {"a": "a", "b": "b", "c": "c"}
    out = capsys.readouterr().out
    assert "all images have the same PatientID" in out and "ANON" not in out


def test_nihs_number_is_taken_where_the_header_names_nobody():
    found = patients_of(["x", "y", "P", "P"], {"a": "7", "b": "7", "c": "9"})
    assert found == {"a": "7", "b": "7", "c": "P", "d": "P"}


def test_the_table_of_nihs_patients_knows_kaggles_ids_alone(tmp_path):
    table = pd.read_csv(dp.NIH_PATIENTS, dtype=str)
    start, number = table.iloc[0]
    ids = [f"{start}-5204-4f31-98e0-f35e4b00004a", f"{start}_scan"]
    assert dp.known_patients(ids, tmp_path) == {ids[0]: number}
    assert len(table) == table["patientId"].nunique() == 19500
    assert table["patient"].value_counts().min() > 1


def test_rsnas_mapping_beside_the_tables_is_used_instead(tmp_path):
    names = [("a", "00000007_000.png"), ("b", "00000007_001.png"), ("c", "00000008_000.png")]
    mapping = [{"subset_img_id": key, "img_id": name} for key, name in names]
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    assert dp.known_patients("abc", tmp_path) == {"a": "7", "b": "7"}


def test_follow_ups_of_a_hospital_stay_together_in_every_fold(tmp_path, write_dicom):
    """120 patients with 3 visits each, every third positive."""
    import dataset
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(360):
        write_dicom(tmp_path / "images" / f"{number}.dcm", PIXELS, PatientID=f"H{number // 3}")
        rows.append(f"{number},1,1,2,2,1" if number % 3 == 0 else f"{number},,,,,0")
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "\n".join(["patientId,x,y,width,height,Target", *rows]))
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(
        "\n".join(["patientId,class", *(f"{number},Normal" for number in range(360))]))
    dp.build_training_csv(tmp_path / "images", tmp_path, tmp_path)
    labels = read_labels(tmp_path / "train.csv")
    folds = dataset.split_folds(labels, 5)
    named = [set(map(labels.patient_of, fold)) for fold in folds]
    assert sum(map(len, named)) == 120 and set(map(len, folds)) == {72}
