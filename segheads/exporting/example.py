"""The program beside an ONNX file: onnxruntime and Pillow, no segheads."""

from pathlib import Path

from segheads.exporting.deployed import Deployed
from segheads.files import write_text

MOST_CLASSES = 256
PROGRAM = '''"""Label an image with {model}: python {name} IMAGE LABELS.png (needs onnxruntime and Pillow)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(str(Path(__file__).with_name("{model}")))
about = session.get_modelmeta().custom_metadata_map
names, palette = json.loads(about["classes"]), json.loads(about["palette"])
protocol, size = json.loads(about["protocol"]), json.loads(about.get("size", "null"))

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
shown = image
if size:  # height and width that the model is bound to
    shown = image.resize(size[::-1], Image.Resampling.BILINEAR)
elif protocol["scale"]:  # the limits of the longer and the shorter side in training
    longer, shorter = max(protocol["scale"]), min(protocol["scale"])
    factor = min(longer / max(image.size), shorter / min(image.size))
    shown = image.resize([max(1, int(n * factor + 0.5)) for n in image.size], Image.Resampling.BILINEAR)
pixels = np.asarray(shown).transpose(2, 0, 1)[None]  # (1, 3, H, W), uint8
(labels,) = session.run(["labels"], {{"images": pixels}})
picture = Image.fromarray(labels[0].astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
picture.putpalette(np.array(palette, dtype=np.uint8).tobytes())
picture.save(sys.argv[2])
for k in np.unique(labels):
    print(f"{{names[k]}}: {{100 * (labels == k).mean():.1f}} %")
'''


def write_example(path: Path, deployed: Deployed) -> Path | None:
    """Write NAME_example.py beside an ONNX file.

    Args:
        path: The ONNX file.
        deployed: What it holds.

    Returns:
        The program; None for a model of other images than RGB of 8 bit, or of more classes than a palette has.
    """
    if not deployed.model.image_form.is_rgb or deployed.model.num_labels > MOST_CLASSES:
        return None
    program = path.with_name(f"{path.stem}_example.py")
    write_text(program, PROGRAM.format(model=path.name, name=program.name))
    return program
