"""Every registered metric: built by name, counts that add up, and numbers that are what its class declares."""

import copy
import pickle

import pytest
import torch

from segheads.metrics import METRICS, SegmentationMetric, find_metric

K = 5
ALL_METRICS = pytest.mark.parametrize("name", list(METRICS))


def batch(images=3, seed=0):
    """Predictions, labels and confidences; the labels in blocks, two thirds of the pixels right, a tenth ignored."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, K, (images, 5, 6), generator=generator)
    labels = blocks.repeat_interleave(12, 1).repeat_interleave(12, 2)
    preds = torch.where(
        torch.rand(labels.shape, generator=generator) < 0.3,
        torch.randint(0, K, labels.shape, generator=generator),
        labels,
    )
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return {"preds": preds, "labels": labels, "confidence": torch.rand(labels.shape, generator=generator)}


def update(metric, maps, images=slice(None)):
    """As `evaluate` does it: by name."""
    names = ("preds", "labels", *(("confidence",) if metric.needs_confidence else ()))
    metric.update(**{name: maps[name][images] for name in names})


def measure(name, maps, **options):
    metric = find_metric(name)(K, **options)
    update(metric, maps)
    return metric.compute()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-14, atol=0, equal_nan=True)


@ALL_METRICS
def test_computes_what_it_declares(name):
    kind, results = find_metric(name), measure(name, batch())
    assert issubclass(kind, SegmentationMetric)
    assert kind.scores
    for key, title in kind.scores.items():
        assert isinstance(title, str)
        assert results[key].shape == ()
        assert results[key].is_floating_point()
        assert results[key].isnan() or 0 <= results[key] <= 1
    for key, title in kind.class_scores.items():
        assert isinstance(title, str)
        assert results[key].shape == (K,)
    assert all(value.device.type == "cpu" for value in results.values())


def test_no_two_metrics_have_a_key_or_a_title_in_common():
    keys = [key for kind in METRICS.values() for key in (*kind.scores, *kind.class_scores)]
    assert len(keys) == len(set(keys))
    for group in ("scores", "class_scores"):
        titles = [title for kind in METRICS.values() for title in getattr(kind, group).values() if title]
        assert len(titles) == len(set(titles))


@ALL_METRICS
def test_split_over_updates_is_as_at_once(name):
    maps, metric = batch(), find_metric(name)(K)
    for images in (1, slice(0, 1), slice(2, 3)):  # one of them without the dimension of the batch
        update(metric, maps, images)
    assert_same(metric.compute(), measure(name, maps))


@ALL_METRICS
def test_merged_copied_and_restored(name):
    maps, kind = batch(), find_metric(name)
    first, second, restored = kind(K), kind(K), kind(K)
    update(first, maps, slice(0, 1))
    update(second, maps, slice(1, 3))
    restored.load_state_dict(first.state_dict())
    for metric in (restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first), first):
        metric.merge_state(second)
        assert_same(metric.compute(), measure(name, maps))
    first.reset()
    assert_same(first.compute(), kind(K).compute())


@ALL_METRICS
def test_ignored_pixels_do_not_count_whatever_is_predicted(name):
    maps = batch()
    expected, ignored = measure(name, maps), maps["labels"] == 255
    changed = {**maps, "preds": torch.where(ignored, (maps["preds"] + 1) % K, maps["preds"])}
    assert_same(measure(name, changed), expected)
    other = {**maps, "labels": torch.where(ignored, K + 2, maps["labels"])}
    assert_same(measure(name, other, ignore_index=K + 2), expected)
    assert not torch.equal(  # else the first comparison would show nothing
        measure(name, {**maps, "preds": (maps["preds"] + 1) % K})[next(iter(METRICS[name].scores))],
        expected[next(iter(METRICS[name].scores))],
    )


@ALL_METRICS
def test_nothing_is_nan(name):
    empty = {key: value[:0] for key, value in batch().items()}
    maps = batch()
    for nothing in (empty, {**maps, "labels": torch.full_like(maps["labels"], 255)}):
        results = measure(name, nothing)
        assert all(results[key].isnan() for key in METRICS[name].scores)
        assert all(results[key].shape == (K,) for key in METRICS[name].class_scores)


@ALL_METRICS
def test_bad_input_is_explained(name):
    kind, maps = find_metric(name), batch()
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0; give the number of classes"):
        kind(0)
    with pytest.raises(ValueError, match=r"one shape, .* got \(3, 60, 71\) and \(3, 60, 72\)"):
        update(kind(K), {**maps, "preds": maps["preds"][..., 1:]})
    with pytest.raises(ValueError, match=r"preds must be an integer label map, got torch\.float32"):
        update(kind(K), {**maps, "preds": maps["preds"].float()})
    with pytest.raises(ValueError, match="unknown"):
        kind(K, unknown=1)


def test_unknown_names_list_the_known():
    known = ", ".join(METRICS)
    with pytest.raises(ValueError, match=f"no metric is called 'bondary'; known: {known}; did you mean 'boundary'"):
        find_metric("bondary")
