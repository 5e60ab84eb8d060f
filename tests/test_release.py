"""RSNA's own release: its two JSON files, and the way from them to a scored test set."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL

import cli
import data_processing as dp
import predict
import release
import sample_data
import train
from cli import InputError

PIXELS = np.zeros((1024, 1024), np.uint8)
TEST_ID = "0000a175-0e68-4ca4-b1af-167204a7e0bc"  # of the challenge's test set
KAGGLE = {"1.1": "aaa", "1.2": "bbb", "1.3": "ccc", "1.4": TEST_ID}  # {SOPInstanceUID: Kaggle's id}
NIH = {"1.1": "00000001_000.png", "1.2": "00000001_001.png", "1.3": "00000302_010.png",
       "1.4": "00000001_002.png"}


def note(image, label, box=None, **keys):
    """An annotation of MD.ai's export."""
    data = box and dict(zip(release.SIDES, box))
    return {"SOPInstanceUID": image, "labelId": label, "width": 1024, "height": 1024,
            "data": data} | keys


def group(name, *labels):
    return {"name": name, "labels": [{"id": name[0] + label[0], "name": label}
                                     for label in labels]}


@pytest.fixture
def project():
    """MD.ai's export of images 1.1 to 1.4, as a dictionary: two with boxes, two without."""
    single = group("Team 1", "Lung Opacity", "Question")
    truth = group("Calculated", "Lung Opacity", "No Lung Opacity / Not Normal", "Xormal")
    truth["labels"][2]["name"] = "Normal"
    return {"labelGroups": [single, truth], "datasets": [{"annotations": [
        note("1.3", "CX"), note("1.1", "TL", [9, 9, 9, 9]), note("1.1", "CL", [10.5, 20, 30, 40]),
        {"labelId": "TQ", "data": None}, note("1.2", "CN"), note("1.1", "CL", [50, 60, 70, 80])]},
        {"annotations": [note("1.4", "CL", [1, 2, 3, 4])]}]}


@pytest.fixture
def mapping():
    return [{"SOPInstanceUID": uid, "subset_img_id": KAGGLE[uid], "img_id": NIH[uid],
             "orig_labels": ["Mass"]} for uid in KAGGLE]


@pytest.fixture
def folder(tmp_path, project, mapping, write_dicom):
    """A data folder in RSNA's layout with the images 1.1 to 1.5, of which the last has no label."""
    folder = tmp_path / "data"
    for uid in (*KAGGLE, "1.5"):
        path = folder / "mdai images" / f"study{uid}" / "series" / f"{uid}.dcm"
        path.parent.mkdir(parents=True)
        write_dicom(path, PIXELS)
    save(folder, project, mapping)
    return folder


def save(folder, project, mapping):
    """Writes both files under names of a user's own."""
    (folder / "labels.json").write_text(json.dumps(project))
    (folder / "ids.json").write_text(json.dumps(mapping))


def process(folder, *flags):
    """Runs data_processing.py with all results in the folder; returns train.csv and test.csv."""
    status = dp.main(["--labels", str(folder), "--images", str(folder / "mdai images"),
                      "--output", str(folder), *flags])
    assert status == 0
    return tuple(pd.read_csv(folder / name, dtype={"patientId": str})
                 for name in ("train.csv", "test.csv"))


def read(folder):
    return release.read_release(folder / "labels.json", folder / "ids.json")


# What is read


def test_the_truth_is_the_calculated_group_in_the_order_of_ids(folder):
    boxes = read(folder).boxes
    assert boxes["patientId"].tolist() == [TEST_ID, "aaa", "aaa", "bbb", "ccc"]
    assert boxes["Target"].tolist() == [1, 1, 1, 0, 0]
    assert boxes.loc[1, release.SIDES].tolist() == [10.5, 20, 30, 40]
    assert boxes.loc[boxes["Target"] == 0, release.SIDES].isna().all(axis=None)


def test_each_image_has_its_class_once(folder):
    classes = read(folder).classes.set_index("patientId")["class"]
    assert classes.to_dict() == {TEST_ID: "Lung Opacity", "aaa": "Lung Opacity",
                                 "bbb": "No Lung Opacity / Not Normal", "ccc": "Normal"}


def test_patients_are_nihs_numbers_without_leading_zeros(folder):
    expected = {"aaa": "1", "bbb": "1", TEST_ID: "1"}  # ccc is the only image of 302
    assert release.patients_of_mapping(folder / "ids.json") == expected


def test_a_missing_key_of_the_mapping_is_missing_alone(folder, project, mapping, capsys):
    del mapping[0]["subset_img_id"], mapping[1]["img_id"], mapping[2]["SOPInstanceUID"]
    save(folder, project, mapping)
    found = read(folder)
    assert set(found.boxes["patientId"]) == {"1.1", "bbb", "1.3", TEST_ID}
    assert found.patients == {"1.1": "1", TEST_ID: "1"}
    assert "labelled images are not in" in capsys.readouterr().out


def test_truth_that_names_no_image_is_counted(folder, project, mapping, capsys):
    project["datasets"][0]["annotations"].append(note(None, "CX"))
    save(folder, project, mapping)
    assert len(read(folder).boxes) == 5
    assert "labels.json name no image and are left out (1): Normal" in capsys.readouterr().out


def test_the_shipped_test_ids_are_3000(folder):
    assert len(set(release.TEST_IDS.read_text().split())) == 3000
    ids = ["0005d3cc-3c3f-40b9-93c3-46231c3eb813", "0004cfab-14fd-4e49-80ba-63a80b6bddd6", "1.2.3"]
    assert release.challenge_test_ids(ids) == {ids[0]}


# Bad input


def empty(project):
    project["datasets"] = []


def rename(project):
    project["labelGroups"][1]["name"] = "Consensus"


def repeat(project):
    project["labelGroups"].append(project["labelGroups"][1])


def relabel(project):
    project["labelGroups"][1]["labels"][0]["name"] = "Fracture"


def add(*notes):
    return lambda project: project["datasets"][0]["annotations"].extend(notes)


@pytest.mark.parametrize("change, message", [
    (dict.clear, "is not an export of MD.ai"),
    (lambda project: project.update(labelGroups="none"), "is not an export of MD.ai"),
    (empty, r"another project: .*Calculated \(1\) have 0 annotations"),
    (rename, r"another project: .*Calculated \(0\)"),
    (repeat, r"another project: .*Calculated \(2\)"),
    (relabel, "another project: .*'Fracture'"),
    (add(note("1.2", "CX")), "image 1.2 has two classes"),
    (add(note("1.1", "CL", [1, 2, 3, 4], width=512)), "image 1.1 has .* in a frame 512 x 1024"),
    (add(note("1.1", "CL", [1, 2, 0, 4])), r"image 1.1 has the box \[1.*, 2.*, 0.*, 4.*\]"),
    (add(note("1.1", "CL", [1, 2, 3, "wide"])), "image 1.1 has the box .*'wide'"),
    (add(note("1.1", "CL")), r"image 1.1 has the box \[None"),
])
def test_wrong_annotations_are_refused(folder, project, mapping, change, message):
    change(project)
    save(folder, project, mapping)
    with pytest.raises(InputError, match=f"labels.json.* {message}"):
        process(folder, "--labels", str(folder / "labels.json"))
    assert not (folder / "train.csv").exists()


@pytest.mark.parametrize("change, message", [
    (lambda mapping: [{**entry, "SOPInstanceUID": "2" + entry["SOPInstanceUID"]}
                      for entry in mapping], "names none of the images of .*labels.json"),
    (lambda mapping: [], "is not a list with subset_img_id"),
    (lambda mapping: {"subset_img_id": mapping}, "is not a list with subset_img_id"),
    (lambda mapping: [1], "is not a list with subset_img_id"),
    (lambda mapping: mapping + [{**mapping[0], "SOPInstanceUID": "1.9"}],
     "has subset_img_id aaa twice"),
    (lambda mapping: mapping + [{**mapping[0], "subset_img_id": "ddd"}],
     "has SOPInstanceUID 1.1 twice"),
])
def test_a_wrong_mapping_is_refused(folder, project, mapping, change, message):
    save(folder, project, change(mapping))
    with pytest.raises(InputError, match=f"ids.json {message}"):
        read(folder)


@pytest.mark.parametrize("name", ["labels.json", "ids.json"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.9, -1])
def test_a_file_cut_off_while_downloading_is_told(folder, name, kept):
    content = (folder / name).read_bytes()
    size = len(content) - 1 if kept < 0 else round(kept * len(content))
    (folder / name).write_bytes(content[:size])
    message = rf"{name} \({size:,} bytes\) ends in the middle: download it again"
    with pytest.raises(InputError, match=message):
        read(folder)


def test_a_file_cut_off_after_a_closing_bracket_is_told(folder):
    content = (folder / "labels.json").read_bytes()
    (folder / "labels.json").write_bytes(content[:content.rindex(b"}]}") + 1])
    with pytest.raises(InputError, match="ends in the middle"):
        read(folder)


@pytest.mark.parametrize("content", [b"<Error>AccessDenied</Error>", b'{"a": 1,,}', b"[1] [2]",
                                     b'{"a": "\xff"}', b"[" * 10**6 + b"]" * 10**6])
def test_broken_json_is_told(folder, content):
    (folder / "labels.json").write_bytes(content)
    with pytest.raises(InputError, match="labels.json .* is not JSON .*: download it again"):
        read(folder)


def test_a_release_without_its_mapping_is_refused(folder):
    (folder / "ids.json").unlink()
    with pytest.raises(InputError, match="one file of RSNA's mapping .* has none"):
        process(folder)


def test_two_files_of_annotations_are_refused_until_one_is_given(folder):
    (folder / "labels (1).json").write_bytes((folder / "labels.json").read_bytes())
    with pytest.raises(InputError, match=r"RSNA's annotations .* labels \(1\).json, labels.json"):
        process(folder)
    assert len(process(folder, "--labels", str(folder / "labels.json"))[0]) == 4


# Tables


def test_train_and_test_images_stand_in_tables_of_their_own(folder, capsys):
    training, test = process(folder)
    assert training["patientId"].tolist() == ["aaa", "aaa", "bbb", "ccc"]
    assert test["patientId"].tolist() == [TEST_ID]
    assert list(training) == list(test) == dp.TRAINING_COLUMNS
    out = capsys.readouterr().out
    assert "images without labels are left out (1): 1.5" in out
    assert "test images: 1, of them 1 of patients who are in train.csv\n" in out


def test_files_are_recognised_by_rsnas_names_and_by_their_content(folder):
    assert release.release_files(folder) == (folder / "labels.json", folder / "ids.json")
    (folder / "ids.json").rename(folder / "pneumonia-challenge-dataset-mappings_2018 (1).json")
    (folder / "folder.json").mkdir()
    (folder / "annotations.json").write_text('{"a": "0.9 1 2 3 4"}')  # predict.py's
    assert release.release_files(folder)[1].name.endswith("(1).json")


def test_patients_of_the_training_images_can_be_left_out_of_the_test(folder, capsys):
    training, test = process(folder, "--unseen-patients")
    assert (training["patientId"].nunique(), len(test)) == (3, 0)
    assert "1 of patients who are in train.csv, which are left out\n" in capsys.readouterr().out


def test_the_sample_submission_tells_the_test_images_where_it_is_at_hand(folder, capsys):
    (folder / cli.SUBMISSION).write_text("patientId,PredictionString\nccc,0.5 0 0 100 100\nzzz,\n")
    training, test = process(folder)
    assert test["patientId"].tolist() == ["ccc"]
    assert training["patientId"].tolist() == [TEST_ID, "aaa", "aaa", "bbb"]
    assert "stage_2_sample_submission.csv have no label in the release (1): zzz" in (
        capsys.readouterr().out)


def test_boxes_outside_the_image_are_named(folder, project, mapping, capsys):
    add(note("1.1", "CL", [1100, 1, 5, 5]), note("1.1", "CL", [1000, 1, 50, 5]))(project)
    save(folder, project, mapping)
    assert process(folder)[0]["x"].dropna().tolist() == [10.5, 50, 1000]
    out = capsys.readouterr().out
    assert "boxes lie outside their image" in out and "without a box (1): aaa" in out
    assert "boxes reach beyond their image and are clipped in training (1): aaa" in out


def test_kaggles_tables_come_first_and_are_compared_if_the_release_is_asked_for(folder, capsys):
    labels, classes = (folder / name for name in (cli.LABELS, cli.CLASSES))
    labels.write_text("patientId,x,y,width,height,Target\naaa,1,2,3,4,1\nbbb,1,2,3,4,1\nccc,,,,,0\n")
    classes.write_text("patientId,class\naaa,Lung Opacity\nbbb,Lung Opacity\nccc,Normal\n")
    with pytest.raises(InputError, match="no image in .* has a label"):  # files bear other names
        process(folder)
    process(folder, "--labels", str(folder / "labels.json"))
    assert "of 3 images that" in (out := capsys.readouterr().out)
    assert "1 have another Target here, and 2 another number of boxes" in out


def test_unseen_patients_needs_the_release(phantoms, tmp_path):
    with pytest.raises(InputError, match="--unseen-patients acts on RSNA's own release alone"):
        dp.main(["--labels", str(phantoms), "--images", str(phantoms / "stage_2_train_images"),
                 "--output", str(tmp_path), "--unseen-patients"])


# Files


@pytest.fixture
def table(tmp_path):
    (tmp_path / "instances.csv").write_text("SOPInstanceUID,patientId\n1.1,aaa\n1.2,bbb\n")
    return tmp_path / "train.csv"


def test_files_get_the_ids_of_the_table_and_those_of_the_other_table_are_counted(table, capsys):
    files = dp.files_of_table({"1.1": "first", "1.2": "second", "x": "third"}, table, {"aaa"})
    assert files == {"aaa": "first", "x": "third"}
    assert "1 images that" in capsys.readouterr().out


def test_a_second_file_of_an_image_is_named(table, capsys):
    assert dp.files_of_table({"aaa": "first", "1.1": "second"}, table, {"aaa"}) == {"aaa": "first"}
    assert "another file shows, too, and are left out (1): second" in capsys.readouterr().out


def test_without_instances_the_files_keep_their_names(tmp_path):
    assert dp.files_of_table({"1.1": "a"}, tmp_path / "train.csv", {"b"}) == {"1.1": "a"}


@pytest.mark.parametrize("extra, expected", [([], "mdai images"), (["notes"], "")])
def test_the_images_are_in_the_only_folder_or_anywhere(folder, extra, expected, monkeypatch):
    for name in (*extra, ".hidden"):
        (folder / name).mkdir()
    monkeypatch.setenv("TRAINML_DATA_PATH", str(folder))
    assert release.image_folder() == expected


def test_without_a_release_the_folder_is_kaggles(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINML_DATA_PATH", str(tmp_path))
    assert release.image_folder() == cli.TRAIN_IMAGES


# All together


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Folders with the same phantoms in both layouts, each with its tables in `tables`."""
    root = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patch:
        for layout in ("kaggle", "rsna"):
            patch.setenv("TRAINML_DATA_PATH", str(root / layout))
            sample_data.main(["--train", "32", "--test", "4", "--layout", layout])
            assert dp.main(["--output", str(root / layout / "tables")]) == 0
    return root


def test_both_layouts_give_the_same_training_table(layouts):
    tables = [(layouts / layout / "tables" / "train.csv").read_text().splitlines()
              for layout in ("kaggle", "rsna")]
    assert tables[0] == tables[1] and len(tables[0]) > 32


def test_the_test_table_of_the_release_has_the_truth_that_kaggle_keeps(layouts):
    truth = dp.read_labels(layouts / "kaggle" / "stage_2_test_labels.csv").boxes
    boxes = dp.read_labels(layouts / "rsna" / "tables" / "test.csv").boxes
    assert boxes.keys() == truth.keys()
    assert all(np.array_equal(boxes[key], truth[key]) for key in truth)


def test_a_run_on_the_release_is_the_same_and_its_test_set_is_scored(
        layouts, monkeypatch, tmp_path, capsys):
    losses = []
    for layout in ("kaggle", "rsna"):
        monkeypatch.setenv("TRAINML_DATA_PATH", str(layouts / layout))
        monkeypatch.setenv("TRAINML_MODEL_PATH", str(layouts / layout / "tables"))
        save = tmp_path / layout
        train.main(["--save", str(save), "--epochs", "1", "--width", "2", "--no-save-images",
                    *SMALL])
        losses.append(json.loads((save / "metrics.json").read_text())["history"][0]["loss"])
    assert losses[0] == losses[1]
    predict.main(["--labels", str(layouts / "rsna" / "tables" / "test.csv"), "--model",
                  str(save / "final.pth.tar"), "--output", str(save), "--no-save-images"])
    out = capsys.readouterr().out
    assert "32 images that" in out and "images predicted: 4," in out
    assert "not scored" not in out and "no image that can be read" not in out
    truth = dp.read_labels(layouts / "kaggle" / "stage_2_test_labels.csv").boxes
    assert json.loads((save / "annotations.json").read_text()).keys() == truth.keys()
