import errno

import numpy as np
import pytest
from PIL import Image

import drawing
from drawing import Overlay, draw_overlay, save_overlay, save_overlays

NO_BOXES = np.zeros((0, 4)), np.zeros(0)


def blank(original_size=(64, 64), **fields):
    """An Overlay that shows a black square of 64 x 64 pixels, without boxes."""
    image, mask = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.float32)
    return Overlay(image, mask, *NO_BOXES, original_size)._replace(**fields)


def has_colour(picture, colour):
    return bool((np.asarray(picture) == colour).all(axis=-1).any())


# The picture


def test_a_caption_says_which_thresholds_are_in_use():
    picture = draw_overlay(blank(caption="box threshold 0.50"))
    assert np.asarray(picture)[-drawing.CAPTION_HEIGHT:].any()


def test_without_a_caption_its_strip_is_black():
    assert not np.asarray(draw_overlay(blank()))[-drawing.CAPTION_HEIGHT:].any()


def test_a_picture_keeps_the_aspect_of_the_original():
    assert draw_overlay(blank((2000, 1000))).size == (512, 1024 + 44)


@pytest.mark.parametrize("colour, x, y, field", [
    (drawing.PREDICTION, 200, 400, {"boxes": [[200, 400, 300, 500]], "confidences": [0.7]}),
    (drawing.TRUTH, 100, 1200, {"truth": [[100, 1200, 600, 300]]}),
])
def test_a_box_is_drawn_where_it_lies_in_the_original(colour, x, y, field):
    pixels = np.asarray(draw_overlay(blank((2000, 1000), **field)))[:1024]
    rows, columns = np.nonzero((pixels == colour).all(axis=-1))
    assert abs(columns.min() - x * 0.512) <= 2 and rows.size > 100
    assert (pixels[round(y * 0.512), round((x + 6) * 0.512)] == colour).all()


@pytest.mark.parametrize("truth, named", [(None, False), (np.zeros((0, 4)), True)])
def test_the_legend_names_the_truth_where_it_is_known(truth, named):
    picture = draw_overlay(blank(truth=truth))
    assert has_colour(picture, drawing.TRUTH) == named
    assert has_colour(picture, drawing.PREDICTION)


def test_the_image_shows_where_the_mask_is_0():
    overlay = blank((512, 512), image=np.full((64, 64), 128, np.uint8))
    assert (np.asarray(draw_overlay(overlay))[:512] == 128).all()


def test_heat_follows_the_mask():
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    overlay = blank((512, 512), image=np.full((64, 64), 128, np.uint8), mask=mask)
    pixels = np.asarray(draw_overlay(overlay), int)
    assert (pixels[100, 100] == 128).all() and pixels[100, 400, 0] > pixels[100, 400, 2] + 50


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_extreme_shapes_can_be_drawn(shape):
    picture = draw_overlay(blank(shape))
    assert picture.size[0] == 512 and 60 <= picture.size[1] <= 2048 + 44


# Files


def test_an_overlay_is_saved_as_png(tmp_path):
    save_overlay(tmp_path, "a", blank())
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (512, 556)


def test_an_id_with_a_folder_lies_in_that_folder(tmp_path):
    save_overlay(tmp_path / "images", "p1/IM0", blank())
    assert (tmp_path / "images" / "p1" / "IM0.png").exists()


def test_a_name_that_the_disk_does_not_take_costs_its_picture_alone(tmp_path, capsys):
    save_overlays(tmp_path, [("a" * 255, blank()), ("b", blank())])
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    assert capsys.readouterr().out.endswith(": File name too long\n")


def test_more_pictures_than_may_wait_are_all_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "WAITING", 2)
    save_overlays(tmp_path, ((str(number), blank()) for number in range(6)))
    assert sorted(path.stem for path in tmp_path.iterdir()) == list("012345")


def test_a_full_disk_ends_the_drawing_with_its_error(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(drawing, "atomic_write", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        save_overlays(tmp_path, [("a", blank())])
