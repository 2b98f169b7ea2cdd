"""What tests of whole runs share."""

from segheads import create_model
from segheads.training import DEMO_RUN

SMALL_RUN = {
    **DEMO_RUN,
    "backbone": "test_vit",
    "head": "linear",
    "loss_reduction": "valid",
    "power": 1.0,
    "scenes_size": 32,
    "scale": (32, 32),
    "crop_size": 32,
    "iterations": 2,
    "batch_size": 2,
    "tracker": "none",
    "pictures": 0,
    "threads": 1,
}
"""Two updates of a small ViT on scenes of 32 pixels, as fields of a configuration without `output`."""


def build(config, num_classes):
    """The model of a configuration, as `run_training` takes it."""
    return create_model(config.model.backbone, config.model.head, num_classes, **config.model_options(num_classes))


TIMED = ("images_per_second", "data_wait", "memory_gb")


def untimed(records):
    """Records of a run without what differs from one time to the next."""
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]
