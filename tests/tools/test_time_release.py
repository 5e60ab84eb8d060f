"""The release in its full size."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.soak
def test_the_full_release_is_read_in_three_seconds_and_half_a_gigabyte():
    run = subprocess.run([sys.executable, "-m", "tools.time_release"], cwd=ROOT, text=True,
                         capture_output=True, check=True)
    assert "29684 labelled images, 7106 positive, 11390 boxes" in run.stdout
    seconds, gigabytes = map(float, re.findall(r"([0-9.]+) (?:s|GB)\b", run.stdout))  # of the clock
    assert seconds <= 3 and gigabytes <= 0.5
