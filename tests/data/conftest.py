import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def noisy_images(tmp_path):
    """A folder with eleven images of noise and an annotation file. All images but the first have one box."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(11):
        height, width = generator.integers(20, 60, 2).tolist()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        if i:
            annotations.append({"id": i, "image_id": 100 + i, "category_id": 2, "bbox": [2, 3, 10, 12]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "thing"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return tmp_path
