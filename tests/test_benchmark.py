"""The benchmark: every stage has a time and a limit, operations are counted right, mistakes are told."""

import json

import pytest

import benchmark
import sample_data
from cli import InputError


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(benchmark.MATRIX_SIDE, "cpu", 256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images, and a table, which is left out."""
    folder = tmp_path_factory.mktemp("benchmark") / "phantoms"
    sample_data.write_images(folder, 3, seed=0, split=0)
    (folder / "labels.csv").write_text("patientId,Target\n")
    return folder


def test_table_growth_and_memory(data, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    benchmark.main(["--data", str(data), "--images", "4", "--growth", "--cache", "5", "--repeats", "1",
                    "--device", "cpu", "--rescale-factor", "16", "--batch-size", "2", "--workers", "2",
                    "--json", str(figures)])
    written, printed = json.loads(figures.read_text()), capsys.readouterr().out
    assert [table["images"] for table in written["tables"]] == [4, 8, 16]
    assert written["cache_bytes"]["images"] == 5 and written["peak_bytes"] > 0
    for table in written["tables"]:
        assert list(table["stages"]) == list(benchmark.STAGES)
        assert all(min(stage["seconds"], stage["limit"]) > 0 for stage in table["stages"].values())
    for text in (*benchmark.STAGES, "images/s", "of the matrix peak", "waits for data", "cost when the images double"):
        assert text in printed


def test_wait_for_data_is_part_of_the_epoch(data, capsys):
    benchmark.main(["--data", str(data), "--images", "2", "--repeats", "1", "--device", "cpu", "--rescale-factor", "16",
                    "--batch-size", "2", "--workers", "1"])
    share = capsys.readouterr().out.split("waits for data ")[1].split("%")[0]
    assert 0 < float(share) < 100


def test_operations_of_the_network():
    products = 615168 * 64**2  # by hand: 615,168 a pixel in the convolutions
    first_layer = 2 * 9 * 64 * 64**2  # its input needs no gradient, all others cost the same three times
    options = benchmark.train.make_parser().parse_args(["--rescale-factor", "16"])
    forward = benchmark.count_operations(options, training=False)
    assert forward == 2 * products
    assert benchmark.count_operations(options, training=True) == pytest.approx(3 * forward - first_layer)
    options.rescale_factor = 4  # 16 pixels in each of as many squares
    assert benchmark.count_operations(options, training=False) == forward + 15 * first_layer


def test_missing_and_unusable_data(tmp_path):
    with pytest.raises(InputError, match="sample_data.py"):
        benchmark.main(["--data", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no file"):
        benchmark.main(["--data", str(tmp_path)])
    path = tmp_path / "text.dcm"
    path.write_text("no image")
    with pytest.raises(InputError, match="no JPEG stream"):
        benchmark.plain_decode(path)
