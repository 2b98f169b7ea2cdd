"""A backbone bound to one size squashes whole images, and the log says so."""

from types import SimpleNamespace

import pytest

from segheads.evaluation.evaluate import warn_of_squashing
from segheads.inference.protocol import WHOLE, InferenceProtocol


@pytest.mark.parametrize(
    ("fixed", "protocol", "warns"),
    [
        ((224, 224), WHOLE, True),
        ((224, 224), InferenceProtocol(window=224, stride=224), False),
        (None, WHOLE, False),
    ],
)
def test_whole_images_of_a_fixed_size_are_warned_of(caplog, fixed, protocol, warns):
    model = SimpleNamespace(backbone=SimpleNamespace(fixed_size=fixed, name="volo_d1_224"))
    warn_of_squashing(model, protocol)
    assert ("volo_d1_224 is bound to images of 224 x 224: whole images of other" in caplog.text) == warns
