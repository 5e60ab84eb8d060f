import errno
import io

import numpy as np
import pytest
from PIL import Image

from metrics import Thresholds
from results import drawing
from results.drawing import (
    GREYS,
    LEGIBLE,
    STYLES,
    Overlay,
    draw_overlay,
    encode_png,
    picture_writer,
    save_overlay,
)

TRUTH, PREDICTION, OUTLINE = range(GREYS, GREYS + len(STYLES))  # numbers in the palette
NO_BOXES = np.zeros((0, 4)), np.zeros(0)
BOX = {"boxes": np.array([[200, 400, 300, 500]]), "confidences": np.array([0.7])}


def grey(original_size=(1000, 1000), **fields):
    """An Overlay of a grey image in its original size, a mask of 0 and no boxes."""
    image, mask = np.full(original_size, 128, np.uint8), np.zeros((64, 64), np.float32)
    overlay = Overlay("", image, mask, *NO_BOXES, original_size, thresholds=Thresholds())
    return overlay._replace(**fields)


def draw(overlay, **options):
    """The picture and its part above the footer, as numbers of the palette."""
    picture = np.asarray(draw_overlay(overlay, **options))
    return picture, picture[:overlay.original_size[0]]


# The radiograph


def test_a_pixel_takes_one_byte():
    assert draw_overlay(grey()).mode == "P"


def test_greys_are_those_of_the_image():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 2))
    colours = np.asarray(draw_overlay(grey((256, 512), image=ramp)).convert("RGB"), int)[:256]
    assert np.abs(colours - ramp[:, :, None]).max() <= 2


def test_without_anything_found_no_pixel_is_covered():
    _, pixels = draw(grey())
    assert (pixels == pixels[0, 0]).all()


@pytest.mark.parametrize("original_size, size", [
    ((1000, 500), (500, 1000)), ((300, 1200), (1200, 300)),
    ((100, 50), (LEGIBLE // 2, LEGIBLE)),  # enlarged
])
def test_a_picture_keeps_the_aspect_of_the_original(original_size, size):
    picture = draw_overlay(grey(original_size)._replace(thresholds=None))
    assert picture.size == (max(size[0], LEGIBLE), size[1])


def test_a_square_image_of_the_network_gets_the_aspect_of_the_original():
    overlay = grey((2000, 1000), image=np.zeros((512, 512), np.uint8), thresholds=None)
    assert draw_overlay(overlay).height == 512


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_extreme_shapes_can_be_drawn(shape):
    picture = draw_overlay(grey(shape, boxes=np.array([[0, 0, 1, 1]]), confidences=np.array([1])))
    assert min(picture.size) >= drawing.NARROWEST


# What is drawn on it


@pytest.mark.parametrize("colour, x, y, field", [
    (PREDICTION, 200, 400, BOX),
    (TRUTH, 100, 600, {"truth": np.array([[100, 600, 600, 300]])}),
])
def test_a_box_is_drawn_where_it_lies_in_the_original(colour, x, y, field):
    _, pixels = draw(grey((2000, 1000), image=np.zeros((1000, 500), np.uint8), **field))
    rows, columns = np.nonzero(pixels[:1000] == colour)
    assert abs(columns.min() - x / 2) <= 1 and abs(rows.min() - y / 2) <= 1


@pytest.mark.parametrize("colour, field, solid", [
    (PREDICTION, BOX, False), (TRUTH, {"truth": BOX["boxes"]}, True)])
def test_truth_is_solid_and_prediction_dashed(colour, field, solid):
    _, pixels = draw(grey(**field))
    left_edge = pixels[410:890, 200] == colour
    assert left_edge.all() == solid and left_edge.mean() > 0.4


def test_lines_stand_on_black_which_shows_them_on_bright_ground():
    _, pixels = draw(grey(truth=BOX["boxes"], image=np.full((1000, 1000), 255, np.uint8)))
    across = pixels[500, 195:206]
    assert (across == 0).sum() == 2 and (across == TRUTH).any()


def test_the_outline_runs_around_the_mask_at_the_box_threshold():
    mask = np.zeros((64, 64), np.float32)
    mask[16:32, 16:32] = 1
    _, pixels = draw(grey((1024, 1024), mask=mask, **BOX))
    rows, columns = np.nonzero(pixels == OUTLINE)
    assert (abs(rows.min() - 256) < 12 and abs(rows.max() - 512) < 12
            and abs(columns.min() - 256) < 12 and abs(columns.max() - 512) < 12)


def test_a_mask_up_to_the_edge_is_outlined_there():
    _, pixels = draw(grey(mask=np.ones((64, 64), np.float32), **BOX))
    assert (pixels[300:900, -1] == OUTLINE).any()


@pytest.mark.parametrize("box", [[0, 0, 300, 300], [900, 900, 100, 100], [0, 0, 1000, 1000]])
def test_confidences_stay_inside_the_picture(box):
    overlay = grey(boxes=np.array([box]), confidences=np.array([0.5]), mask=np.zeros((64, 64)))
    _, with_label = draw(overlay)
    _, without = draw(overlay._replace(confidences=np.zeros(0)))
    width = drawing._font(1000).getlength("0.50")
    assert (with_label != without).any(axis=0).sum() >= width


# The footer


def footer(overlay, **options):
    picture, _ = draw(overlay, **options)
    return picture[overlay.image.shape[0]:]


@pytest.mark.parametrize("field, colours", [
    ({}, set()), (BOX, {PREDICTION}), ({"truth": BOX["boxes"]}, {TRUTH}),
    ({"truth": np.zeros((0, 4))}, set()),
])
def test_the_legend_names_what_is_drawn(field, colours):
    assert set(np.unique(footer(grey(**field)))) & {252, 253, 254} == colours


def test_a_grid_has_no_legend():
    assert footer(grey(**BOX), legend=False).max() < GREYS


def test_the_caption_says_what_was_found_and_at_which_thresholds():
    font = drawing._font(1000)
    empty, marked = grey(patient_id="a"), grey(patient_id="a", **BOX)
    assert drawing._caption(empty, font, 1000) == [
        "a, no opacity found", "box threshold 0.50, gate threshold 0.80 (defaults)"]
    assert drawing._caption(marked, font, 1000)[0] == "a"


def test_without_a_prediction_the_caption_is_the_id_alone():
    overlay = grey(patient_id="a", thresholds=None)
    assert drawing._caption(overlay, drawing._font(1000), 1000) == ["a"]


def test_long_ids_are_broken_into_lines_that_fit():
    font = drawing._font(LEGIBLE)
    lines = drawing._caption(grey(patient_id="0123456789" * 20, thresholds=None), font, LEGIBLE)
    assert len(lines) > 1 and all(font.getlength(line) <= LEGIBLE for line in lines)


# Files


def test_a_png_file_holds_the_picture():
    picture = draw_overlay(grey(**BOX))
    with Image.open(io.BytesIO(encode_png(picture))) as read:
        assert read.format == "PNG" and read.mode == "P"
        assert np.array_equal(read.convert("RGB"), picture.convert("RGB"))


def test_an_id_with_a_folder_lies_in_that_folder(tmp_path):
    save_overlay(tmp_path / "images", grey(patient_id="p1/IM0"))
    assert (tmp_path / "images" / "p1" / "IM0.png").exists()


def save_all(folder, ids):
    with picture_writer(folder) as write:
        for patient_id in ids:
            write(grey(patient_id=patient_id))


def test_without_a_folder_no_picture_is_drawn(monkeypatch):
    monkeypatch.setattr(drawing, "draw_overlay", None)
    save_all(None, ["a"])


def test_a_name_that_the_disk_does_not_take_costs_its_picture_alone(tmp_path, capsys):
    save_all(tmp_path, ["a" * 255, "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    assert capsys.readouterr().out.endswith(": File name too long\n")


def test_more_pictures_than_may_wait_are_all_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "WAITING", 2)
    save_all(tmp_path, "012345")
    assert sorted(path.stem for path in tmp_path.iterdir()) == list("012345")


def test_pictures_do_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", None)
    save_all(tmp_path, ["a"])
    assert (tmp_path / "a.png").exists()


def test_a_full_disk_ends_the_drawing_with_its_error(tmp_path, monkeypatch):
    def refuse(path, durable):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(drawing, "atomic_write", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        save_all(tmp_path, ["a"])
