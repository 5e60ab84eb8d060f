"""The benchmark: every stage has a time and a limit, operations are counted right, mistakes are
named."""

import contextlib
import io
import json

import pytest

import sample_data
from cli import InputError
from tools import benchmark

SMALL = ["--repeats", "1", "--device", "cpu", "--rescale-factor", "16", "--batch-size", "2"]


@pytest.fixture(autouse=True, scope="module")
def small_matrices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark.MATRIX_SIDE, "cpu", 256)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images, and a table, which is left out."""
    folder = tmp_path_factory.mktemp("benchmark") / "phantoms"
    sample_data.write_images(folder, 3, seed=0, split=0)
    (folder / "labels.csv").write_text("patientId,Target\n")
    return folder


@pytest.fixture(scope="module")
def three_sizes(data, tmp_path_factory):
    """Figures and printed text of a run at three sizes, which measures memory first."""
    path = tmp_path_factory.mktemp("figures") / "figures.json"
    flags = ["--images", "4", "8", "16", "--cache", "5", "--workers", "2", "--json", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        benchmark.main(["--data", str(data), *SMALL, *flags])
    return json.loads(path.read_text()), out.getvalue()


def test_every_stage_is_measured_at_each_number_of_images(three_sizes):
    figures, _ = three_sizes
    assert [table["images"] for table in figures["tables"]] == [4, 8, 16]
    for table in figures["tables"]:
        assert list(table["stages"]) == list(benchmark.STAGES)


def test_every_stage_has_a_time_and_a_limit(three_sizes):
    figures, _ = three_sizes
    stages = [stage for table in figures["tables"] for stage in table["stages"].values()]
    assert all(min(stage["seconds"], stage["limit"]) > 0 for stage in stages)


def test_memory_is_measured(three_sizes):
    figures, _ = three_sizes
    assert figures["cache_bytes"]["images"] == 5 and figures["peak_bytes"] > 0


@pytest.mark.parametrize("text", [
    *benchmark.STAGES, "images/s", "of the matrix peak", "waits for data"])
def test_the_table_names_stages_and_units(three_sizes, text):
    assert text in three_sizes[1]


def test_wait_for_data_is_part_of_the_epoch(data, capsys):
    benchmark.main(["--data", str(data), *SMALL, "--images", "2", "--workers", "1"])
    share = capsys.readouterr().out.split("waits for data ")[1].split("%")[0]
    assert 0 < float(share) < 100


PRODUCTS = 154080 * 64**2  # by hand: 154,080 a pixel in the convolutions
FIRST_LAYER = 2 * 9 * 32 * 64**2


def test_operations_of_inference_are_those_counted_by_hand():
    assert benchmark.count_operations(16, training=False) == 2 * PRODUCTS


def test_operations_of_training_are_three_times_as_many_but_for_the_first_layer():
    # its input needs no gradient
    expected = 3 * 2 * PRODUCTS - FIRST_LAYER
    assert benchmark.count_operations(16, training=True) == pytest.approx(expected)


def test_larger_images_cost_more_in_the_first_layer_alone():
    # 16 pixels in each of as many patches
    assert benchmark.count_operations(4, training=False) == 2 * PRODUCTS + 15 * FIRST_LAYER


def test_missing_data_are_named_with_the_script_that_makes_some(tmp_path):
    with pytest.raises(InputError, match="sample_data.py"):
        benchmark.main(["--data", str(tmp_path / "none")])


def test_a_file_of_figures_that_cannot_be_written_is_refused_before_the_work(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to .*file .*--json"):
        benchmark.main(["--data", str(data), "--json", str(tmp_path / "file" / "figures.json")])


def test_a_folder_without_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        benchmark.main(["--data", str(tmp_path)])


def test_a_file_without_a_jpeg_stream_is_refused(tmp_path):
    path = tmp_path / "text.dcm"
    path.write_text("no image")
    with pytest.raises(InputError, match="no JPEG stream"):
        benchmark.plain_decode(path)
