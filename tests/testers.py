"""One tester for each kind of part: what every entry of a registry owes.

A test file runs one over its registry, so that a new entry is tested without a line of its own:

    @pytest.mark.parametrize("name", list(HEADS))
    class TestHeads(HeadTester):
        pass
"""

import copy
import math
from typing import ClassVar

import miniatures
import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity
from torch import Tensor, nn

from segheads import SegmentationModel, TimmBackbone, create_model
from segheads.data import DATASETS, DataConfig, open_dataset
from segheads.data.dataset import SegmentationDataset
from segheads.errors import DataMissingError, OptionError
from segheads.heads import find_head
from segheads.merges import MERGES
from segheads.pyramids import PYRAMIDS


def randomised(module: nn.Module, std: float = 0.5) -> nn.Module:
    """No parameter at a value, such as 0, that would hide it; in eval mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def outputs_of(module, x):
    """What a part gives, as a list."""
    result = module(x)
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def assert_exports_and_compiles(module, *inputs):
    """Exported for the first input and compiled without a break, it gives the same for each of equal shape."""
    with torch.no_grad():
        exported = torch.export.export(module, (inputs[0],)).module()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for x in inputs:  # nothing of the first is left in the graph
            assert_same(outputs_of(exported, x), outputs_of(module, x))
            assert_same(outputs_of(compiled, x), outputs_of(module, x))


def assert_copies_are_apart(module, x):
    """A deep copy gives the same, and is no longer bound to the original."""
    expected, copied = outputs_of(module, x), copy.deepcopy(module)
    assert_same(outputs_of(copied, x), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(torch.nan)
    assert_same(outputs_of(module, x), expected)


def assert_comes_back(model: SegmentationModel, folder):
    """A saved model gives the same after it is loaded."""
    images = torch.randn(1, 3, 40, 50)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(SegmentationModel.from_pretrained(folder)(images), model(images))


class HeadTester:
    """A head by its name: on one map or on four, of 24 channels, for 5 classes."""

    @staticmethod
    def build(name, channels=24, num_classes=5):
        kind = find_head(name)
        return kind([channels] * 4 if kind.multi_level else channels, num_classes)

    @staticmethod
    def maps(name, batch, channels=24, h=3, w=4, **options):
        """What the head takes: a map, or four that shrink by half."""
        sizes = [(-(-h // n), -(-w // n)) for n in (1, 2, 4, 8)]
        x = [torch.randn(batch, channels, *size, **options) for size in sizes]
        return x if find_head(name).multi_level else x[0]

    @pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (1, 1), (19, 26)])
    def test_shape(self, name, h, w):
        head, x = self.build(name).eval(), self.maps(name, 2, h=h, w=w)
        assert head(x).shape == (2, 5, h * head.upsampling, w * head.upsampling)
        assert head.predictions(x)[0].shape == head(x).shape
        assert (head.in_channels, head.num_classes) == ([24] * 4 if find_head(name).multi_level else 24, 5)

    def test_one_class_and_one_channel(self, name):
        head = self.build(name, 1, 1).eval()
        assert head(self.maps(name, 1, 1)).shape == (1, 1, 3 * head.upsampling, 4 * head.upsampling)

    def test_logits_of_one_class_differ_from_place_to_place(self, name):
        torch.manual_seed(0)
        head, x = self.build(name, num_classes=1), self.maps(name, 1, h=9, w=12)
        for parameter in head.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.3)
        assert head.eval()(x).std() > 1e-3

    def test_gradients_reach_every_parameter_and_the_input(self, name):
        head, x = self.build(name).train(), self.maps(name, 2, h=9, w=12, requires_grad=True)
        torch.manual_seed(0)  # stochastic depth may drop a block; not with this seed
        sum(prediction.square().sum() for prediction in head.predictions(x)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
        assert all(level.grad.any() for level in (x if isinstance(x, list) else [x]))

    def test_loss_is_a_scalar_with_gradients(self, name):
        head, labels = self.build(name), torch.randint(0, 5, (2, 9, 12))

        def criterion(logits, labels):
            return F.cross_entropy(F.interpolate(logits, labels.shape[1:]), labels)

        loss = head.loss(self.maps(name, 2), labels, criterion)
        assert loss.shape == ()
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in head.parameters())

    def test_batch_equals_single(self, name):
        head, x = self.build(name).eval(), self.maps(name, 3)
        single = [[level[i : i + 1] for level in x] if isinstance(x, list) else x[i : i + 1] for i in range(3)]
        torch.testing.assert_close(head(x), torch.cat([head(image) for image in single]))

    def test_exports_and_compiles(self, name):
        assert_exports_and_compiles(self.build(name).eval(), self.maps(name, 1))

    def test_copies_are_equal_and_apart(self, name):
        assert_copies_are_apart(self.build(name).eval(), self.maps(name, 1))

    def test_16_bit(self, name):
        head, x = self.build(name), self.maps(name, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predictions = head.predictions(x)
            sum(prediction.float().square().mean() for prediction in predictions).backward()
        assert all(prediction.isfinite().all() for prediction in predictions)
        assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)

    @pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning")
    def test_int8_of_linear_layers(self, name):
        torch.manual_seed(0)
        head, x = self.build(name).eval(), self.maps(name, 2, h=9, w=12)
        for parameter in head.parameters():
            if parameter.ndim >= 2:
                nn.init.xavier_normal_(parameter)  # no weight is 0, as some are at first
        quantised = torch.ao.quantization.quantize_dynamic(head, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            expected, found = head(x), quantised(x)
        assert (found - expected).abs().mean() <= 0.1 * expected.std()
        if any(isinstance(part, nn.Linear) for part in head.modules()):
            assert not torch.equal(found, expected)

    def test_saved_model_comes_back(self, name, tmp_path):
        width = {"out_channels": 16} if find_head(name).multi_level else None  # a narrow pyramid, where there is one
        assert_comes_back(create_model("test_vit", name, 5, pretrained=False, pyramid_kwargs=width), tmp_path)

    def test_wrong_channels_are_named(self, name):
        kind = find_head(name)
        if kind.multi_level:
            message = rf"{kind.__name__} takes a list of maps .* \[24, 24, 24, 24\]; got \[\(1, 23, 3, 4\), .*"
        else:
            message = rf"{kind.__name__} takes .*\(B, 24, h, w\); got \(1, 23, 3, 4\)"
        with pytest.raises(ValueError, match=message):
            self.build(name)(self.maps(name, 1, 23))
        with pytest.raises(ValueError, match=r"must be 1 or more; got (24|\[24, 24, 24, 24\]) and 0"):
            self.build(name, num_classes=0)


class PyramidTester:
    """A pyramid by its name, on the maps of a backbone for an image of 75 x 101; `OPTIONS` make some of them small."""

    SIZES = ((19, 26), (10, 13), (5, 7), (3, 4))
    CHANNELS = (5, 6, 7, 24)
    OPTIONS: ClassVar = {"fpnt": {"num_layers": 2, "num_heads": 2, "window_size": 3}, "simple": {"stride": 32}}
    FROM_THE_LAST_MAP = ("simple",)

    @classmethod
    def build(cls, name, **options):
        return PYRAMIDS[name](list(cls.CHANNELS), 6, **cls.OPTIONS.get(name, {}), **options)

    @classmethod
    def maps(cls, batch=1, sizes=SIZES):
        return [torch.randn(batch, C, h, w) for C, (h, w) in zip(cls.CHANNELS, sizes, strict=True)]

    @pytest.mark.parametrize("sizes", [SIZES, [(1, 1)] * 4, [(5, 3), (3, 2), (2, 1), (1, 1)]])
    def test_channels_and_strides_are_true(self, name, sizes):
        pyramid = self.build(name)
        assert pyramid.in_channels == list(self.CHANNELS)
        outputs = pyramid(self.maps(2, sizes))
        if name in self.FROM_THE_LAST_MAP:
            h, w = sizes[-1]
            sizes = [(8 * h, 8 * w), (4 * h, 4 * w), (2 * h, 2 * w), (h, w)]
        assert [level.shape for level in outputs] == [
            (2, C, *size) for C, size in zip(pyramid.channels, sizes, strict=True)
        ]
        assert pyramid.output_strides([4, 8, 16, 32]) == [4, 8, 16, 32]

    def test_one_channel(self, name):
        outputs = PYRAMIDS[name]([1], 1)([torch.randn(1, 1, 3, 2)])
        assert all(level.shape[:2] == (1, 1) for level in outputs)

    @pytest.mark.parametrize("num_outputs", [1, 2, 3, 4, None])
    def test_num_outputs_are_the_finest_of_the_whole(self, name, num_outputs):
        whole, part, maps = self.build(name).eval(), self.build(name, num_outputs=num_outputs).eval(), self.maps()
        count = num_outputs or 4
        missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
        assert not missing
        assert bool(unexpected) == (count < 4)  # the other levels' layers are not built
        assert part.channels == [6] * count
        assert part.output_strides([4, 8, 16, 32]) == [4, 8, 16, 32][:count]
        assert_same(part(maps), whole(maps)[:count])

    @pytest.mark.parametrize("num_outputs", [None, 1])
    def test_gradients_reach_every_parameter_and_map(self, name, num_outputs):
        torch.manual_seed(0)
        pyramid, maps = randomised(self.build(name, num_outputs=num_outputs)), self.maps()
        for level in maps:
            level.requires_grad_()
        sum((level * torch.randn_like(level)).sum() for level in pyramid(maps)).backward()
        assert [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()] == []
        used = maps[-1:] if name in self.FROM_THE_LAST_MAP else maps
        assert all(level.grad is not None and level.grad.any() for level in used)

    def test_batch_equals_single(self, name):
        pyramid, maps = randomised(self.build(name)), self.maps(batch=3)
        singles = [pyramid([level[i : i + 1] for level in maps]) for i in range(3)]
        for i, level in enumerate(pyramid(maps)):
            torch.testing.assert_close(level, torch.cat([single[i] for single in singles]))

    def test_exports_and_compiles(self, name):
        assert_exports_and_compiles(randomised(self.build(name)), self.maps(), self.maps())

    def test_copies_are_equal_and_apart(self, name):
        assert_copies_are_apart(randomised(self.build(name)), self.maps())

    def test_state_comes_back_and_the_maps_may_be_of_another_size(self, name):
        """A module that has seen one size gives on another what a fresh copy gives."""
        pyramid, fresh = randomised(self.build(name)), self.build(name).eval()
        fresh.load_state_dict(pyramid.state_dict())
        other = self.maps(2, [(8, 9), (4, 5), (2, 3), (1, 2)])
        with torch.no_grad():
            pyramid(self.maps())
            assert_same(pyramid(other), fresh(other))

    def test_16_bit(self, name):
        torch.manual_seed(0)
        pyramid, maps = self.build(name), self.maps()
        expected = pyramid(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = pyramid(maps)
            sum(level.float().square().mean() for level in outputs).backward()
        for actual, level in zip(outputs, expected, strict=True):
            assert float((actual.float() - level).detach().abs().mean()) < 0.03
        assert all(p.grad.isfinite().all() for p in pyramid.parameters())
        pyramid.bfloat16()
        for fused in (True, False):
            for module in pyramid.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            outputs = pyramid([level.bfloat16() for level in maps])
            assert all(level.dtype == torch.bfloat16 and level.isfinite().all() for level in outputs)

    def test_bad_in_channels_are_named(self, name):
        kind = PYRAMIDS[name]
        with pytest.raises(
            ValueError, match=rf"{kind.__name__} takes a list of maps: in_channels must list .*; got \[\]"
        ):
            kind([])
        with pytest.raises(ValueError, match="in_channels must list their channels; got 64"):
            kind(64)
        with pytest.raises(ValueError, match=r"in_channels and out_channels must be 1 or more; got \[4, 0\] and 6"):
            kind([4, 0], 6)
        with pytest.raises(ValueError, match=r"in_channels and out_channels must be 1 or more; got \[4\] and 0"):
            kind([4], 0)

    @pytest.mark.parametrize("num_outputs", [0, -1, 5])
    def test_bad_num_outputs_is_named(self, name, num_outputs):
        message = f"num_outputs must be from 1 to 4, the number of levels; got {num_outputs}"
        with pytest.raises(ValueError, match=message):
            self.build(name, num_outputs=num_outputs)

    def test_bad_maps_are_named(self, name):
        pyramid, maps = self.build(name), self.maps()
        start = rf"{type(pyramid).__name__} takes a list of 4 maps \(B, C_i, h_i, w_i\), fine to coarse, of channels "
        start += r"\[5, 6, 7, 24\]; got "
        with pytest.raises(ValueError, match=start + r"\[\(1, 5, 19, 26\), \(1, 6, 10, 13\), \(1, 7, 5, 7\)\]$"):
            pyramid(maps[:3])
        with pytest.raises(ValueError, match=start + r"\[\(1, 24, 3, 4\), .*, \(1, 5, 19, 26\)\]$"):
            pyramid(maps[::-1])
        with pytest.raises(ValueError, match=start + r"\[\(1, 5, 494\), .*\]$"):
            pyramid([level.flatten(2) for level in maps])
        with pytest.raises(ValueError, match=start):
            pyramid([*maps, maps[0][0]])
        with pytest.raises(ValueError, match=r"takes a list of maps of channels \[5, 6, 7, 24\]; got \(1, 24, 3, 4\)"):
            pyramid(maps[-1])
        with pytest.raises(ValueError, match=r"takes a list of maps of channels \[5, 6, 7, 24\]; got NoneType"):
            pyramid(None)

    def test_bad_strides_are_named(self, name):
        with pytest.raises(ValueError, match=r"strides must be 4, one per map that comes in; got \[8, 16\]"):
            self.build(name).output_strides([8, 16])


class MergeTester:
    """A merge by its name: a function of the learners' logits, or a module that is one."""

    @staticmethod
    def build(name, count=3, K=5, trained=True):
        merge = MERGES[name]
        if not isinstance(merge, type):
            return merge
        module = merge(count, K)
        return (randomised(module) if trained else module).eval()

    @staticmethod
    def logits(count=3, K=5, size=(3, 4), scale=1.0, dtype=torch.float32):
        torch.manual_seed(0)
        return [scale * torch.randn(2, K, *size, dtype=dtype) for _ in range(count)]

    @pytest.mark.parametrize("scale", [1.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_finite_and_normalised_with_finite_gradients(self, name, scale, dtype):
        logits = [x.requires_grad_() for x in self.logits(scale=scale, dtype=dtype)]
        merge = self.build(name)
        result = merge.to(dtype)(logits) if isinstance(merge, nn.Module) else merge(logits)
        assert result.dtype == dtype
        assert result.isfinite().all()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(result.exp().sum(1), torch.ones(2, 3, 4, dtype=dtype), rtol=0, atol=tolerance)
        F.nll_loss(result, torch.zeros(2, 3, 4, dtype=torch.long)).backward()
        assert all(x.grad.isfinite().all() for x in logits)

    @pytest.mark.parametrize(("count", "K", "size"), [(2, 1, (1, 1)), (4, 7, (5, 3))])
    def test_shape(self, name, count, K, size):
        assert self.build(name, count, K)(self.logits(count, K, size)).shape == (2, K, *size)

    def test_batch_equals_single(self, name):
        merge, logits = self.build(name), self.logits()
        single = [merge([x[i : i + 1] for x in logits]) for i in range(2)]
        torch.testing.assert_close(merge(logits), torch.cat(single))

    def test_gradients_reach_every_weight(self, name):
        merge = self.build(name)
        weights = list(merge.parameters()) if isinstance(merge, nn.Module) else []
        logits = [x.requires_grad_() for x in self.logits()]
        F.nll_loss(merge(logits), torch.zeros(2, 3, 4, dtype=torch.long)).backward()
        assert all(p.grad.any() for p in [*weights, *logits])

    def test_16_bit_is_widened(self, name):
        merge, logits = self.build(name), [x.bfloat16() for x in self.logits()]
        result = merge.bfloat16()(logits) if isinstance(merge, nn.Module) else merge(logits)
        assert result.dtype == torch.float32
        assert result.isfinite().all()

    def test_exports_and_compiles(self, name):
        merge = self.build(name)

        class Merge(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = merge

            def forward(self, logits):
                return self.inner(logits)

        assert_exports_and_compiles(Merge(), self.logits(), [-x for x in self.logits()])

    def test_saved_model_comes_back(self, name, tmp_path):
        options = {"pyramid_kwargs": {"out_channels": 16}, "head_kwargs": {"merge": name}}
        model = create_model("test_resnet", "senformer", 5, pretrained=False, pyramid="fpn", **options)
        if model.head.learned_merge is not None:
            randomised(model.head.learned_merge)
        assert_comes_back(model, tmp_path)


class DatasetTester:
    """A data set by its name, as `open_dataset` opens it; `miniatures.LAYOUTS` draws its files."""

    OPTIONS: ClassVar = {"folder": {"num_classes": 3}, "scenes": {"scenes_size": 64}}

    @staticmethod
    def has_files(name):
        return name == "folder" or DATASETS[name].usual_root is not None

    def config(self, name, root):
        data_root = root if self.has_files(name) else None
        return DataConfig(dataset=name, data_root=data_root, **self.OPTIONS.get(name, {}))

    def test_contract(self, name, tmp_path):
        if self.has_files(name):
            miniatures.LAYOUTS.get(name, miniatures.own_folder)(tmp_path)
        for split in ("train", "val"):
            dataset = open_dataset(self.config(name, tmp_path), split)
            assert isinstance(dataset, SegmentationDataset)
            assert isinstance(dataset, DATASETS[name])
            self.check_classes(dataset)
            self.check_items(dataset)

    def check_classes(self, dataset):
        names = dataset.class_names
        assert dataset.num_classes == len(names) == len(set(names)) == len(dataset.palette)
        assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in dataset.palette)
        assert dataset.ignore_index == 255

    def check_items(self, dataset):
        assert isinstance(dataset.name(0), str)
        picture, stored = dataset.read(0)
        assert (picture.mode, picture.size, stored.dtype) == ("RGB", tuple(stored.shape[::-1]), torch.uint8)
        image, labels = dataset[len(dataset) - 1]
        assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert image.shape == (3, *labels.shape)
        assert 0 <= image.min() <= image.max() <= 1
        values = set(labels.unique().tolist())
        assert values <= {*range(dataset.num_classes), 255}
        assert values != {255}
        with pytest.raises(IndexError):
            dataset[len(dataset)]

    def test_what_is_not_there_is_named(self, name, tmp_path):
        if self.has_files(name):
            with pytest.raises(DataMissingError, match=f"there is no .*{tmp_path}"):
                open_dataset(self.config(name, tmp_path), "val")

    def test_unknown_splits_are_named(self, name, tmp_path):
        if self.has_files(name):
            miniatures.LAYOUTS.get(name, miniatures.own_folder)(tmp_path)
        with pytest.raises((OptionError, DataMissingError), match="nonsense"):
            open_dataset(self.config(name, tmp_path), "nonsense")

    def test_options_are_fields(self, name):
        assert DATASETS[name].options <= DataConfig.__dataclass_fields__.keys()


class BackboneTester:
    """An architecture of timm by its name, small."""

    IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def build(name, **options):
        torch.manual_seed(0)
        return TimmBackbone(name, pretrained=False, **options)

    @staticmethod
    def grids(size, strides):
        return [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides]

    @pytest.mark.parametrize("size", [(37, 51), (1, 1), (64, 200), (97, 33)])
    def test_any_size(self, name, size):
        backbone = self.build(name).eval()
        with torch.no_grad():
            features = backbone(torch.rand(1, 3, *size))
        assert [tuple(x.shape[-2:]) for x in features] == self.grids(size, backbone.strides)
        assert all(x.isfinite().all() for x in features)

    def test_batch_equals_single(self, name):
        backbone = self.build(name).eval()
        with torch.no_grad():
            together = backbone(self.IMAGE)
            for i in range(2):
                alone = backbone(self.IMAGE[i : i + 1])
                for one, both in zip(alone, together, strict=True):
                    assert_parity(one, both[i : i + 1])

    def test_compiles_without_graph_breaks(self, name):
        torch._dynamo.reset()
        backbone = self.build(name).eval()
        compiled = torch.compile(backbone, fullgraph=True, backend="eager")
        with torch.no_grad():
            for image in (self.IMAGE, self.IMAGE[..., :37, :51]):
                assert_same(compiled(image), backbone(image))

    def test_16_bit(self, name):
        backbone = self.build(name).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = backbone(self.IMAGE)
            sum(x.float().square().mean() for x in features).backward()
        assert all(x.isfinite().all() for x in features)
        assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)

    def test_copies_are_equal_and_apart(self, name):
        assert_copies_are_apart(self.build(name).eval(), self.IMAGE)

    def test_state_comes_back(self, name):
        backbone, other = self.build(name).eval(), self.build(name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
            other.load_state_dict(backbone.state_dict())
            assert_same(other.eval()(self.IMAGE), backbone(self.IMAGE))
