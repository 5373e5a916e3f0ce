"""Features of images, computed without torch by the ONNX file of `m3ae-fast convert RUN --out encoder.onnx --format
onnx`.

python examples/onnx_features.py encoder.onnx A.jpg B.jpg        prints the cosine similarity of the two images
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels(path: str, size: int) -> np.ndarray:
    """Return the central square, uint8 [3, size, size], of an RGB image."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
size = session.get_inputs()[0].shape[-1]
(features,) = session.run(None, {"pixels": np.stack([pixels(path, size) for path in sys.argv[2:]])})
features /= np.linalg.norm(features, axis=1, keepdims=True)
print(features[0] @ features[1])
