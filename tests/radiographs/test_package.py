"""The folder can be lifted out: it needs nothing else of this project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import make_dicom
from PIL import Image

import radiographs

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import radiographs

if __name__ == "__main__":
    files, skipped = radiographs.find_radiographs(list(map(Path, sys.argv[1:])))
    with radiographs.read_images(files.values(), side=32, workers=2, display_size=16) as readings:
        dicom, png, damaged = readings
    assert list(files) == ["a", "b", "c"] and not skipped
    assert dicom.value.image.shape == (32, 32) and dicom.value.display.shape == (16, 16)
    np.testing.assert_array_equal(dicom.value.image, png.value.image)
    print(damaged.problem)
    print(sorted({module.partition(".")[0] for module in sys.modules} & {"torch", "cli"}))
"""


def test_the_folder_alone_reads_a_dicom_file_a_png_and_a_damaged_one(tmp_path):
    shutil.copytree(Path(radiographs.__file__).parent, tmp_path / "radiographs",
                    ignore=shutil.ignore_patterns("__pycache__"))
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    make_dicom(pixels).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "c.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-100])
    (tmp_path / "script.py").write_text(SCRIPT)
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "script.py", "a.dcm", "b.png", "c.dcm"], cwd=tmp_path,
                          env=elsewhere, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    problem, ours = done.stdout.splitlines()
    assert "pixel data is less than expected" in problem and ours == "[]"
