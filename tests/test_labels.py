import gzip

import pandas as pd
import pytest

from cli import InputError
from labels import read_boxes, read_labels, read_table

LABELS = "patientId,x,y,width,height,Target\na,1,2,3,4,1\na,5,1,2,2,1\nb,,,,,0\nc,,,,,0\n"


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
    boxes, views = read_labels(path)
    assert {key: value.tolist() for key, value in boxes.items()} == {
        "a": [[1, 2, 3, 4], [5, 1, 2, 2]], "b": []}
    assert views == {"a": "AP", "b": "PA"}


def test_labels_of_the_challenge_have_no_views(path):
    boxes, views = read_labels(path)
    assert boxes["b"].shape == (0, 4) and views == {"a": "", "b": "", "c": ""}
