"""tools/compare.py, on the metrics.json of runs that are made up."""

import json
import subprocess
import sys

from conftest import ROOT


def test_an_auc_that_a_run_could_not_define_is_nan(tmp_path):
    for seed, auc in ((1, 0.5), (2, None)):  # None: its fold has no positive image in PA view
        (tmp_path / "runs" / str(seed)).mkdir(parents=True)
        metrics = {"arguments": {"fold": 0, "seed": seed},
                   "rsna_mean_average_precision": 0.1 * seed, "image_roc_auc": 0.75,
                   "image_roc_auc_AP": 0.5, "image_roc_auc_PA": auc,
                   "seconds": {"train": 6}, "history": [{}, {}]}
        (tmp_path / "runs" / str(seed) / "metrics.json").write_text(json.dumps(metrics))
    output = subprocess.check_output(
        [sys.executable, ROOT / "tools" / "compare.py", tmp_path / "runs"], text=True)
    line = "| runs | 0.1500 | 0.100, 0.200 | - | 0.750 | 0.500 | nan | 3 |"
    assert output.splitlines()[2] == line
