import torch

from model import Ensemble, PneumoniaUNET, load_checkpoint, save_checkpoint
from tools.ship import ship


def write_runs(folder):
    """Checkpoints of two runs, with all that a run writes of itself."""
    paths = [folder / f"{seed}.pth.tar" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = PneumoniaUNET(patch_size=2, width=4)
        torch.nn.init.normal_(model.up_1[1].conv.weight)
        save_checkpoint(path, model, rescale_factor=8, args={"data": "/home/me"}, history=[{}],
                        best_threshold=0.1)
    return paths


def test_the_shipped_file_gives_the_mean_of_its_networks_masks(tmp_path):
    paths = write_runs(tmp_path)
    ship(paths, tmp_path / "weights" / "shipped")
    model, _ = load_checkpoint(tmp_path / "weights" / "shipped")
    assert isinstance(model, Ensemble)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    images = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        mean = sum(load_checkpoint(path)[0](images).sigmoid() for path in paths) / 2
        torch.testing.assert_close(model(images).sigmoid(), mean, atol=0.005, rtol=0)
    assert mean.std() > 0.05


def test_the_shipped_file_holds_nothing_of_its_runs_and_is_the_same_every_time(tmp_path):
    paths = write_runs(tmp_path)
    lines = {ship(paths, tmp_path / name).partition(": ")[2] for name in ("a", "b")}
    assert len(lines) == 1
    _, checkpoint = load_checkpoint(tmp_path / "a")
    assert checkpoint.keys() == {"networks", "rescale_factor", "best_threshold", "gate_threshold",
                                 "threshold_source", "size_weight"}
    assert checkpoint["best_threshold"] == 0.5  # not that of a run
    assert b"home" not in (tmp_path / "a").read_bytes()
