import json

import pytest

from segheads.data.resize import rescaled_size
from segheads.inference.protocol import WHOLE, InferenceProtocol


def test_json_and_back():
    protocol = InferenceProtocol(scale=(2048, 512), window=512, stride=384, scales=(0.5, 1.0), flip=True)
    assert InferenceProtocol(**json.loads(json.dumps(protocol.as_json()))) == protocol
    assert InferenceProtocol(**WHOLE.as_json()) == WHOLE


@pytest.mark.parametrize("size", [(512, 683), (300, 3000), (37, 21), (1, 4000)])
def test_sizes_follow_the_rule_of_the_data(size):
    protocol = InferenceProtocol(scale=(2048, 512))
    assert protocol.scaled_size(*size) == rescaled_size(*size, scale=(2048, 512))
    assert protocol.scaled_size(*protocol.scaled_size(*size)) == protocol.scaled_size(*size)
    assert WHOLE.scaled_size(*size) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (512, 0)}, "scale must be positive, got 0"),
        ({"scale": 512}, "scale must be two sides in pixels, got 512"),
        ({"window": 16, "stride": 17}, r"at most the window \(16, 16\), got \(17, 17\)"),
        ({"stride": 16}, "a stride needs a window, got stride 16"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceProtocol(**options)
