import json
import re

import pandas as pd
import torch

from model import PneumoniaUNET, save_checkpoint
from tools import card


def write_run(folder, data, table, fold):
    """What card.py reads of a run that left out one half of the patients."""
    folder.mkdir()
    torch.manual_seed(fold)
    model = PneumoniaUNET(patch_size=2, width=4)
    torch.nn.init.normal_(model.up_1[1].conv.weight)
    save_checkpoint(folder / "final.pth.tar", model, rescale_factor=8, best_threshold=0.05,
                    gate_threshold=0.0, size_weight=0.8)
    ids = sorted(pd.read_csv(table, dtype=str)["patientId"].unique())
    lines = [f"{patient_id},{'test' if number % 2 == fold else 'training'}"
             for number, patient_id in enumerate(ids)]
    (folder / "split.csv").write_text("\n".join(["patientId,split", *lines]))
    (folder / "metrics.json").write_text(json.dumps(
        {"arguments": {"data": str(data), "labels": str(table), "fold": fold}}))
    return str(folder)


def test_the_card_scores_each_image_once_by_the_network_that_left_it_out(
        phantoms, train_csv, tmp_path, monkeypatch, capsys):
    data = phantoms / "stage_2_train_images"
    runs = [write_run(tmp_path / str(fold), data, train_csv, fold) for fold in (0, 1)]
    monkeypatch.setattr("sys.argv", ["card", "--ids", *runs])
    card.main()
    printed = capsys.readouterr().out
    table = pd.read_csv(train_csv, dtype=str)
    images, positive = table["patientId"].nunique(), table[table["Target"] == "1"]
    assert re.findall(r"fold (\d): (\d+) images", printed) == [
        ("0", str(images - images // 2)), ("1", str(images // 2))]
    assert f"| all | {images} | {positive['patientId'].nunique()} | " in printed
    parts = re.findall(r"\| fold \d \| (\d+) \|", printed)
    assert sum(map(int, parts)) == images
    assert set(positive["patientId"]) & set(printed.split())
