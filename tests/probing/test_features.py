"""Features on disk: whole or not there, never another's, within bounds."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from segheads import TimmBackbone
from segheads.data import CamVid, IterationSampler, RandomScaleCrop, Scenes, TrainingSamples
from segheads.data.subset import SubsetDataset
from segheads.probing import CachedSamples, FeatureCache, RoundSampler, as_it_is, fingerprint_data, fingerprint_module
from segheads.probing import features as feature_cache

KEYS = [(0, 3), (1, 2)]
LABELS = torch.arange(32, dtype=torch.uint8).view(2, 4, 4)


def maps_of(*dtypes):
    return [torch.randn(2, 3, 4, 5).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)])
def test_what_is_kept_comes_back_with_its_bits(tmp_path, dtypes):
    maps = maps_of(*dtypes)
    maps[0] = maps[0].contiguous(memory_format=torch.channels_last)
    cache = FeatureCache(tmp_path, {"a": 1})
    assert cache.load(KEYS) is None
    cache.save(KEYS, maps, LABELS)
    for one in (cache, FeatureCache(tmp_path, {"a": 1})):
        known = one.load(KEYS)
        assert [x.dtype for x in known["maps"]] == list(dtypes)
        assert all(torch.equal(x, y) for x, y in zip(known["maps"], maps, strict=True))
        assert torch.equal(known["labels"], LABELS)
    assert not list(tmp_path.rglob(".incomplete*"))


def test_nothing_else_is_taken_for_it(tmp_path):
    FeatureCache(tmp_path, {"a": 1}).save(KEYS, maps_of(torch.float32), LABELS)
    assert FeatureCache(tmp_path, {"a": 2}).load(KEYS) is None
    for keys in (KEYS[::-1], KEYS[:1], [*KEYS, (0, 0)], [(0, 3), (2, 2)]):
        assert FeatureCache(tmp_path, {"a": 1}).load(keys) is None


def test_a_half_written_file_is_never_read(tmp_path, monkeypatch):
    """The process dies after half of the file, and once more just before the renaming."""
    cache, maps = FeatureCache(tmp_path, {}), maps_of(torch.float32)

    class Killed(BaseException):
        pass

    def half(tensors, path):
        save_file(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise Killed

    def killed(*_):
        raise Killed

    for count, (module, name, value) in enumerate([(feature_cache, "save_file", half), (os, "replace", killed)], 1):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            patch.setattr(feature_cache.Path, "unlink", lambda *_, **__: None)  # nobody tidies up after a kill
            with pytest.raises(Killed):
                cache.save(KEYS, maps, LABELS)
        assert len(list(tmp_path.rglob(".incomplete*"))) == count
        assert cache.load(KEYS) is None
    cache.save(KEYS, maps, LABELS)
    assert torch.equal(cache.load(KEYS)["maps"][0], maps[0])


def test_what_a_full_disk_leaves_is_removed(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", full)
    cache = FeatureCache(tmp_path, {})
    with pytest.raises(OSError, match="No space left"):
        cache.save(KEYS, maps_of(torch.float32), LABELS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_damaged_file_is_named(tmp_path):
    cache = FeatureCache(tmp_path, {})
    cache.save(KEYS, maps_of(torch.float32), LABELS)
    os.truncate(cache.path(KEYS), 100)
    with pytest.raises(ValueError, match=f"{cache.path(KEYS).name} is damaged .*delete it"):
        cache.load(KEYS)


def test_the_cache_stays_within_its_bounds(tmp_path, monkeypatch):
    cache, batches = FeatureCache(tmp_path, {"x": 1}), [KEYS, [(0, 1), (0, 2)], KEYS]
    with pytest.raises(ValueError, match=r"take 4e-06 GB, .* holds 0 GB and may take 3\.99e-06 GB; raise cache_gb"):
        cache.prepare(batches, 1000, 3990)
    assert not any(tmp_path.iterdir())
    assert cache.prepare(batches, 1000, 4000) == 4000
    assert json.loads((cache.folder / "about.json").read_text()) == {"x": 1}
    cache.save(KEYS, maps_of(torch.float32), LABELS)
    assert cache.prepare(batches, 1000, 10_000) == 2000  # one of the two is there
    other = FeatureCache(tmp_path, {"x": 2})
    with pytest.raises(ValueError, match="raise cache_gb, go round in fewer batches .*or delete folders of"):
        other.prepare(batches, 1000, 4000)  # what others keep counts, too
    usage = shutil.disk_usage(tmp_path)._replace(free=3999)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="the disk of .* has 4e-06 GB left"):
        other.prepare(batches, 1000, 10_000)


def test_rounds():
    def order(**options):
        return list(RoundSampler(5, 2, seed=1, num_iterations=11, **options))

    plain = list(IterationSampler(5, 2, seed=1, num_iterations=11))
    assert order() == order(distinct=11) == order(distinct=99) == plain
    rounds = order(distinct=4)
    assert rounds[:4] == plain[:4]
    assert all(sorted(rounds[i : i + 4]) == sorted(plain[:4]) for i in (0, 4))
    assert rounds[4:8] != plain[:4] or rounds[8:] != plain[:3]
    for start in range(12):
        assert order(distinct=4, start_iteration=start) == rounds[start:]
        assert order(start_iteration=start) == plain[start:]
    sampler = RoundSampler(5, 2, seed=1, num_iterations=11, distinct=4, start_iteration=9)
    assert len(sampler) == 2
    assert list(sampler.parts(0, 1)) == plain[:4]
    assert list(sampler.parts(1, 2)) == [batch[1:] for batch in plain[:4]]


def test_rounds_that_cannot_be():
    with pytest.raises(ValueError, match="distinct must be 1 batch or more; got 0"):
        RoundSampler(5, 2, seed=0, num_iterations=4, distinct=0)
    with pytest.raises(ValueError, match="start_iteration 5 is outside the run of 4"):
        RoundSampler(5, 2, seed=0, num_iterations=4, distinct=2, start_iteration=5)
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"):
        RoundSampler(0, 2, seed=0, num_iterations=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_samples_until_there_are_maps(tmp_path, workers):
    samples = TrainingSamples(Scenes(size=(32, 32), length=4), RandomScaleCrop(32, scale=(32, 32)), seed=0)
    cache = FeatureCache(tmp_path, {})
    sampler = RoundSampler(4, 2, seed=0, num_iterations=2)
    loader = DataLoader(CachedSamples(samples, cache), batch_sampler=sampler, collate_fn=as_it_is, num_workers=workers)
    fresh = list(loader)
    assert [batch["keys"].tolist() for batch in fresh] == [[list(key) for key in batch] for batch in sampler]
    assert torch.equal(fresh[1]["image"][0], samples[next(iter(sampler.parts(0, 1)))[0]]["image"]) is False
    assert torch.equal(fresh[0]["image"][0], samples[next(iter(sampler))[0]]["image"])
    maps = maps_of(torch.float32)
    cache.save(fresh[1]["keys"].tolist(), maps, fresh[1]["labels"])
    first, second = loader
    assert "image" in first
    assert set(second) == {"maps", "labels"}
    assert torch.equal(second["maps"][0], maps[0])
    assert torch.equal(second["labels"], fresh[1]["labels"])


def test_fingerprint_of_weights():
    torch.manual_seed(0)
    backbone = TimmBackbone("test_vit", pretrained=False, img_size=32)
    before = fingerprint_module(backbone)
    assert before == fingerprint_module(backbone)
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[-1] += 1e-3
    changed = fingerprint_module(backbone)
    backbone.model.norm.eps = 1e-2
    assert len({before, changed, fingerprint_module(backbone)}) == 3


def test_fingerprint_of_data(tmp_path):
    marks = {
        fingerprint_data(Scenes(split, size=size, length=length, seed=seed))
        for split, size, length, seed in [
            ("train", (32, 32), 4, 0),
            ("val", (32, 32), 4, 0),
            ("train", (32, 48), 4, 0),
            ("train", (32, 32), 5, 0),
            ("train", (32, 32), 4, 1),
        ]
    }
    assert len(marks) == 5
    assert fingerprint_data(Scenes(length=4)) == fingerprint_data(Scenes(length=4))
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            pixels = np.zeros((8, 8) if "annot" in folder else (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    part = SubsetDataset(CamVid(tmp_path), 2)
    before, of_part = fingerprint_data(CamVid(tmp_path)), fingerprint_data(part)
    assert before == fingerprint_data(CamVid(tmp_path)) != of_part
    changed = np.zeros((8, 8), dtype=np.uint8)
    changed[2] = 7
    Image.fromarray(changed).save(tmp_path / "trainannot" / "1.png")  # not one of the three that are read
    assert before != fingerprint_data(CamVid(tmp_path))
    assert of_part != fingerprint_data(part)
    before = fingerprint_data(CamVid(tmp_path))
    os.utime(tmp_path / "train" / "3.png", ns=(1, 1))
    assert before != fingerprint_data(CamVid(tmp_path))
