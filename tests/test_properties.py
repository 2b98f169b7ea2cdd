"""Properties that hold whatever the numbers: shapes, labels, protocols and configurations."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segheads.data import LabelMap
from segheads.data.labels import to_class_indices
from segheads.errors import SegheadsError
from segheads.files import read_json
from segheads.heads import HEADS, LinearHead
from segheads.inference.protocol import InferenceProtocol
from segheads.inference.windows import _starts
from segheads.plan import ModelPlan
from segheads.pyramids import FPN
from segheads.saving import read_model
from segheads.schema import check_fields, check_value

few = settings(max_examples=30, derandomize=True, deadline=None, database=None)
sides = st.integers(1, 40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@few
@given(st.integers(1, 3), st.integers(1, 9), sides, sides, st.integers(1, 6))
def test_a_head_keeps_the_grid_and_a_pyramid_the_sizes(B, C, h, w, K):
    x = torch.zeros(B, C, h, w)
    assert LinearHead(C, K)(x).shape == (B, K, h, w)
    maps = FPN([C, C], 4)([x, torch.zeros(B, C, -(-h // 2), -(-w // 2))])
    assert [tuple(level.shape) for level in maps] == [(B, 4, h, w), (B, 4, -(-h // 2), -(-w // 2))]


@few
@given(st.integers(1, 300), st.integers(0, 2), st.lists(st.integers(0, 400), min_size=1, max_size=20), st.data())
def test_every_label_becomes_its_class_or_is_refused(K, first, values, data):
    ignored = data.draw(st.lists(st.integers(0, 400), max_size=2))
    array = np.array([values], np.uint16)
    nothing = 255 if K <= 255 else -1
    expected = [nothing if v in ignored else v - first for v in values]
    if any(v not in ignored and not first <= v < first + K for v in values):
        with pytest.raises(SegheadsError, match=r"a\.png"):
            to_class_indices(array, K, first=first, ignored=ignored, path="a.png")
    else:
        found = to_class_indices(array, K, first=first, ignored=ignored, path="a.png")
        assert found[0].astype(int).tolist() == expected


@few
@given(st.dictionaries(st.integers(-5, 300), st.none() | st.integers(0, 9), min_size=1, max_size=8))
def test_a_label_map_is_the_same_after_json_and_maps_each_value(classes):
    mapped = LabelMap(classes)
    assert LabelMap.from_json(json.loads(json.dumps(mapped.as_json()))) == mapped
    array = np.array([list(classes)], np.int32)
    found = mapped.to_classes(array, 10, path="a.png")[0].tolist()
    assert found == [255 if target is None else target for target in classes.values()]


@few
@given(st.integers(1, 200), st.integers(1, 64), st.data())
def test_windows_cover_an_image_and_stay_inside(size, window, data):
    stride = data.draw(st.integers(1, window))
    window = min(window, size)
    starts = list(_starts(size, window, min(stride, window)))
    covered = {place for start in starts for place in range(start, start + window)}
    assert covered == set(range(size))


protocols = st.builds(
    dict,
    window=st.none() | st.integers(-3, 600),
    stride=st.none() | st.integers(-3, 600),
    scales=st.lists(st.floats(allow_nan=True), max_size=3),
    threshold=st.floats(),
    flip=st.booleans(),
)


@few
@given(protocols)
def test_a_protocol_is_refused_or_the_same_after_json(values):
    try:
        made = InferenceProtocol(**{**values, "scales": tuple(values["scales"])})
    except ValueError:
        return
    again = InferenceProtocol(**json.loads(json.dumps(made.as_json())))
    assert again == made
    assert all(scale > 0 for scale in made.scales)
    assert made.stride is None or made.stride <= made.window


@few
@given(st.dictionaries(st.sampled_from([*ModelPlan.__dataclass_fields__, "x"]), json_values, max_size=5))
def test_any_configuration_is_a_plan_or_a_value_error(values):
    values = {"backbone": "test_vit", "head": "linear", "num_classes": 3, **values}
    try:
        check_fields(values, ModelPlan, "model")
        plan = read_model(values)
    except ValueError as error:
        assert str(error)  # noqa: PT017 (either outcome is right)
        return
    assert plan.head in HEADS or plan.head.startswith("smp:")
    assert 1 <= plan.num_classes < 2**15


@few
@given(json_values, st.sampled_from([int, float, bool, str, list[int], int | None, dict[str, int], tuple[int, int]]))
def test_what_is_checked_is_of_its_kind(value, kind):
    try:
        check_value(value, kind, "option")
    except ValueError as error:
        assert str(error).startswith("option")  # noqa: PT017
        return
    kinds = {
        float: (int, float),
        list[int]: list,
        tuple[int, int]: list,
        dict[str, int]: dict,
        int | None: (int, type(None)),
    }
    assert isinstance(value, kinds.get(kind, kind))
    assert kind in (bool,) or not isinstance(value, bool)


@few
@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_an_error_that_names_the_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    try:
        found = read_json(path, "a dictionary", SegheadsError)
    except SegheadsError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert isinstance(found, dict)
