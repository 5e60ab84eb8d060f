"""What a run leaves in its folder.

A network's mask of a radiograph becomes an Overlay, with its boxes. drawing.py makes it a picture;
report.py makes it a row of the page that shows all pictures of a run, below the plots of curves.py.
records.py keeps the checkpoints and logs of a training, predictions.py the tables of a prediction,
dicom_objects.py what it gives to picture archives; layout.py says where files lie.
"""

from .drawing import (
    IMAGE_SIZE,
    STYLES,
    Overlay,
    draw_overlay,
    encode_png,
    make_overlay,
    picture_writer,
    save_overlay,
)
from .layout import refuse_to_replace, result_paths
from .predictions import Predictions, dicom_writer, stamp_of
from .records import Records, overlays, versions
