"""What a run leaves: pictures, plots, a page, and the files of a training.

drawing.py draws one image and its boxes, curves.py plots losses and scores, report.py writes the
page that shows both, and records.py keeps a training run's checkpoints and logs.
"""

from .curves import draw_history, draw_scores
from .drawing import (
    COLOURS,
    GREYS,
    IMAGE_SIZE,
    STYLES,
    TRUTH,
    Overlay,
    draw_overlay,
    encode_png,
    make_overlay,
    picture_path,
    picture_writer,
    save_overlay,
)
from .records import Records, overlays, versions
from .report import Row, row_of, write_report
