import pytest
import torch

import cli
from model import PneumoniaUNET, load_checkpoint, save_checkpoint
from tools import ship


@pytest.fixture
def run(tmp_path):
    """The checkpoint of a run, with all that it writes of itself."""
    torch.manual_seed(0)
    model = PneumoniaUNET(patch_size=2, width=4)
    torch.nn.init.normal_(model.up_1[1].conv.weight)
    path = tmp_path / "run" / "final.pth.tar"
    path.parent.mkdir()
    save_checkpoint(path, model, rescale_factor=8, args={"data": "/home/me"}, history=[{}],
                    best_threshold=0.4, gate_threshold=0.8, size_weight=0.8)
    return path


def test_the_shipped_file_gives_the_masks_of_the_run(run, tmp_path):
    ship.ship(run, tmp_path / "weights" / "shipped")
    model, _ = load_checkpoint(tmp_path / "weights" / "shipped")
    images = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(run)[0](images), model(images))


def test_the_shipped_file_holds_nothing_of_its_run_and_is_the_same_every_time(run, tmp_path):
    lines = {ship.ship(run, tmp_path / name / "shipped") for name in ("a", "b")}
    assert len(lines) == 1
    content = (tmp_path / "a" / "shipped").read_bytes()
    _, checkpoint = load_checkpoint(tmp_path / "a" / "shipped")
    assert checkpoint.keys() == {"state_dict", "config", "rescale_factor", "best_threshold",
                                 "gate_threshold", "threshold_source", "size_weight"}
    assert checkpoint["best_threshold"] == 0.4
    assert b"home" not in content


def test_a_complete_run_is_shipped_without_training(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ship, "SHIPPED", tmp_path / "shipped")
    ship.main(["nowhere", "nowhere.csv", str(run.parent)])
    assert capsys.readouterr().out.startswith("shipped: 0.")
    assert (tmp_path / "shipped").exists()


def test_the_repository_has_a_model_that_can_be_loaded():
    model, checkpoint = load_checkpoint(cli.SHIPPED)
    assert cli.SHIPPED.stat().st_size < 16e6 and checkpoint["rescale_factor"] == 4
    model.check_side(4)
