"""Run a model that scripts/export.py wrote, without torch: python scripts/run_onnx.py mine.onnx photo.jpg ...

Needs onnxruntime, numpy and OpenCV. Prints a line for each box: file, class, score, x1, y1, x2, y2 in pixels. Letters
of class names that the terminal lacks are escaped.
"""

import json
import signal
import sys

import cv2
import numpy as np
import onnxruntime

sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # typeshed takes it for any TextIO
if hasattr(signal, "SIGPIPE"):  # not on Windows
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently once the reader has: | head -5


def refuse(reason: str):
    sys.exit(print(f"error: {reason}", file=sys.stderr) or 2)


if len(sys.argv) < 3:
    usage = "give a model and images: python scripts/run_onnx.py mine.onnx photo.jpg"
    sys.exit(print(__doc__)) if "--help" in sys.argv else refuse(usage)
try:
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    short_side, long_side, names = about["short_side"], about["long_side"], about["class_names"]
    if about["preprocessing"] == "outside" or about["nms"] == "outside":
        refuse(f"{sys.argv[1]}: export it with preprocessing and NMS inside")
except Exception as error:
    refuse(f"{sys.argv[1]}: not a model of scripts/export.py ({str(error).splitlines()[0]})")

for path in sys.argv[2:]:
    try:
        height, width = (image := np.asarray(cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR))).shape[:2]
    except FileNotFoundError:
        refuse(f"{path}: no such file")
    except (ValueError, OSError, cv2.error):  # not an image (None, without sides), or too large
        refuse(f"{path}: cannot be read as an image")
    scale = min(short_side / min(height, width), long_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if 2 * max(size[0] / width, size[1] / height) < 1 else cv2.INTER_LINEAR
    resized = cv2.cvtColor(cv2.resize(image, size, interpolation=how), cv2.COLOR_BGR2RGB)
    boxes, scores, labels, _ = session.run(["boxes", "scores", "labels", "image"], {"images": resized[None]})
    for box, score, label in zip(boxes * np.tile([width / size[0], height / size[1]], 2), scores, labels):
        threshold = about["score_thresholds"][label]
        if score >= (threshold if threshold >= 0 else 0.3):
            print(path, names[label], f"{score:.3f}", *(f"{value:.1f}" for value in box))
