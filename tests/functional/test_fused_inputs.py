"""What mean shift hands to fused attention on a GPU: shown on tensors that claim to be there, without one."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion

from segheads.functional import mean_shift

affinity = importlib.import_module("segheads.functional.affinity")
pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 14), reason="gradients of fake CUDA tensors: 2.14 has them, 2.7 aborts"
)


@pytest.fixture
def gpu(monkeypatch):
    """Fake CUDA tensors; `asked` and `given` are what decides and what attention got; `serves` is a GPU's rule."""
    found = SimpleNamespace(asked=[], given=[], tiles=[], serves=pytorch_would_serve)
    attention, tiles = F.scaled_dot_product_attention, affinity._Tiles.apply

    def can_use(params):
        found.asked.append(params)
        return found.serves(params)

    def spy(*inputs, **options):
        found.given.append(inputs)
        return attention(*inputs, **options)

    def tiles_spy(*inputs):
        found.tiles.append(inputs)
        return inputs[0] + 0 * inputs[1].sum()

    monkeypatch.setattr(affinity, "SDPAParams", lambda q, k, v, *_: SimpleNamespace(query=q, key=k, value=v))
    monkeypatch.setattr(affinity, "can_use_flash_attention", lambda params: can_use(params))
    monkeypatch.setattr(affinity, "can_use_efficient_attention", lambda params: False)
    monkeypatch.setattr(affinity.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(affinity, "_Tiles", SimpleNamespace(apply=tiles_spy))
    with FakeTensorMode():
        yield found
    assert tiles


def pytorch_would_serve(params):
    """What flash and efficient attention ask of tensors: one width, a multiple of 8, and channels side by side."""
    tensors = (params.query, params.key, params.value)
    return all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] == tensors[0].shape[-1] for x in tensors)


def tensors(channels, d_ms, layout, batch, size, dtype=torch.float32):
    h, w = size
    if layout == "tokens":
        x = torch.empty(batch, h * w, channels, device="cuda", dtype=dtype)
    elif layout == "tokens of a map":
        x = torch.empty(batch, channels, h * w, device="cuda", dtype=dtype).mT
    else:
        x = torch.empty(batch, channels, h, w, device="cuda", dtype=dtype)
        if layout == "channels last":
            x = x.to(memory_format=torch.channels_last)
    return x, torch.empty(d_ms, channels, device="cuda", dtype=dtype)


@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize("layout", ["tokens", "tokens of a map", "map", "channels last"])
@pytest.mark.parametrize("d_ms", [192, 256, 264, 384, 768])
@pytest.mark.parametrize(("batch", "size"), [(2, (12, 16)), (1, (7, 13)), (1, (1, 1))], ids=str)
def test_every_layout_reaches_attention_with_channels_side_by_side(gpu, kernel, layout, d_ms, batch, size):
    x, weight = tensors(d_ms, d_ms, layout, batch, size)
    found = mean_shift(x.requires_grad_(), weight.requires_grad_(), kernel=kernel)
    assert found.shape == x.shape
    width = d_ms + 8 * (kernel == "gaussian")  # the norm is one more channel, and is filled up to 8
    if width > affinity.WIDEST_ON_CUDA:
        assert not gpu.given
        assert len(gpu.tiles) == 1
        return
    ((q, k, v),) = gpu.given
    assert not gpu.tiles
    for x in (q, k, v):
        assert x.shape == (batch, 1, size[0] * size[1], width)
        assert x.stride(-1) == 1
        assert x.dtype == torch.float32
        assert x.is_cuda
    assert q.requires_grad
    (params,) = gpu.asked
    assert (params.query, params.key, params.value) == (q, k, v)  # they decide themselves, and are made once


@pytest.mark.parametrize("channels", [185, 190, 192, 251])
def test_odd_widths_are_filled_up(gpu, channels):
    mean_shift(*tensors(channels, channels, "map", 1, (3, 5)))
    ((q, k, v),) = gpu.given
    assert {x.shape[-1] for x in (q, k, v)} == {-(-channels // 8) * 8}
    assert {x.stride(-1) for x in (q, k, v)} == {1}


@pytest.mark.parametrize("refuses", ["dtype", "gradient", "length"])
def test_what_attention_refuses_takes_tiles(gpu, refuses):
    rule = {
        "dtype": lambda params: params.query.dtype != torch.float64,
        "gradient": lambda params: not params.query.requires_grad,
        "length": lambda params: params.query.shape[2] != 60,
    }[refuses]
    gpu.serves = rule
    fine, other = tensors(192, 192, "map", 2, (3, 5)), tensors(192, 192, "map", 2, (3, 5))
    if refuses == "dtype":
        other = tensors(192, 192, "map", 2, (3, 5), torch.float64)
    elif refuses == "gradient":
        other[1].requires_grad_()
    else:
        other = tensors(192, 192, "map", 2, (6, 10))
    mean_shift(*fine)
    assert (len(gpu.given), len(gpu.tiles)) == (1, 0)
    mean_shift(*other)
    assert (len(gpu.given), len(gpu.tiles)) == (1, 1)


def test_under_autocast_the_narrow_type_decides(gpu, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    mean_shift(*tensors(192, 192, "map", 2, (3, 5)), kernel="cosine")  # whose projections autocast leaves wide
    assert [x.dtype for x in gpu.given[0]] == [torch.bfloat16] * 3
    assert gpu.asked[0].query.dtype == torch.bfloat16
