import inspect
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity
from torch import nn

from segheads.pyramids import FPN, FPNT, PYRAMIDS, Pyramid, SimplePyramid

SIZES = [(19, 26), (10, 13), (5, 7), (3, 4)]  # a backbone's maps of an image of 75 x 101
CHANNELS = [5, 6, 7, 24]
OPTIONS = {"fpnt": {"num_layers": 2, "num_heads": 2, "window_size": 3}, "simple": {"stride": 32}}
BUILDS = {name: partial(kind, CHANNELS, 6, **OPTIONS.get(name, {})) for name, kind in PYRAMIDS.items()}
ALL = pytest.mark.parametrize("name", list(BUILDS))

# From the names of SenFormer's code to ours.
NAMES = [
    (r"^lateral_convs\.(\d+)\.conv\.", r"laterals.\1."),
    (r"^fpn_convs\.(\d+)\.conv\.", r"outputs.\1."),
    (r"^fpn_swins\.(\d+)\.swin_blocks\.blocks\.(\d+)\.", r"outputs.\1.\2."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]


def rename(state):
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def some_maps(batch=1):
    return [torch.randn(batch, C, h, w) for C, (h, w) in zip(CHANNELS, SIZES, strict=True)]


def randomised(module):
    """No parameter at a value, such as 0, that would hide it."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


# ---------------------------------------------------------------- FPN and FPNT as published


@pytest.mark.parametrize("case", ["fpn_neck", "fpnt_neck__odd", "fpnt_neck__shift", "eps_probe__fpnt_neck"])
def test_equals_published(case, golden):
    vectors = golden(case)
    config = vectors.config
    channels, width = config["in_channels"], config["out_channels"]
    if config["type"] == "FPN":
        pyramid = FPN(channels, width)
    else:
        sizes = {"num_heads": config["num_heads"], "window_size": config["window_size"]}
        pyramid = FPNT(channels, width, num_layers=config["depth_swin"], **sizes)
    state = rename(vectors.tensors("state."))
    for key in [key for key in state if key.endswith("relative_position_index")]:
        index = state.pop(key)
        assert index.equal(pyramid.get_buffer(key))
    pyramid.load_state_dict(state)
    pyramid.eval()
    maps = [vectors[f"input.level_{i}"].requires_grad_() for i in range(len(channels))]
    outputs = pyramid(maps)
    for i, output in enumerate(outputs):
        assert_parity(output, vectors[f"output.level_{i}"])
    gradients = rename(vectors.tensors("grad.state."))
    assert bool(gradients) == (case in ("fpn_neck", "fpnt_neck__odd"))
    if gradients:
        assert gradients.keys() == dict(pyramid.named_parameters()).keys()
        sum((output * vectors[f"cotangent.level_{i}"]).sum() for i, output in enumerate(outputs)).backward()
        for name, parameter in pyramid.named_parameters():
            assert_parity(parameter.grad, gradients[name], 2e-5)
        for i, level in enumerate(maps):
            assert_parity(level.grad, vectors[f"grad.input.level_{i}"], 2e-5)


def slow_top_down(pyramid, maps):
    """Every level's sum, cell by cell: a cell takes what lies over its upper left corner on the coarser map."""
    levels = []
    for lateral, level in zip(pyramid.laterals, maps, strict=True):
        levels.append(torch.einsum("dc,bchw->bdhw", lateral.weight[:, :, 0, 0], level) + lateral.bias[:, None, None])
    for fine, coarse in reversed(list(pairwise(levels))):
        (h, w), (H, W) = coarse.shape[2:], fine.shape[2:]
        for y in range(H):
            for x in range(W):
                fine[:, :, y, x] += coarse[:, :, y * h // H, x * w // W]
    return levels


def slow_window_block(block, x, window, shift, num_heads):
    """A block on one map (h, w, D), window by window and head by head, each key asked for its place."""
    h, w, D = x.shape
    H, W = -(-h // window) * window, -(-w // window) * window
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    padded = x.new_zeros(H, W, D)
    padded[:h, :w] = normed * block.norm1.weight + block.norm1.bias
    attended = torch.zeros_like(padded)
    attn, d = block.attn, D // num_heads
    for top in range(0, H, window):
        for left in range(0, W, window):
            # places in the window, where they come from on the padded map, and whether from over an edge
            places = [(i, j) for i in range(window) for j in range(window)]
            origins = [((top + i + shift) % H, (left + j + shift) % W) for i, j in places]
            wrapped = [(top + i + shift >= H, left + j + shift >= W) for i, j in places]
            tokens = torch.stack([padded[origin] for origin in origins])
            q, k, v = (tokens @ attn.qkv.weight.T + attn.qkv.bias).split(D, dim=1)
            result = []
            for head in range(num_heads):
                part = slice(head * d, (head + 1) * d)
                scores = q[:, part] @ k[:, part].T / d**0.5
                for a, (ya, xa) in enumerate(places):
                    for b, (yb, xb) in enumerate(places):
                        row = (ya - yb + window - 1) * (2 * window - 1) + xa - xb + window - 1
                        scores[a, b] += attn.relative_position_bias_table[row, head]
                        scores[a, b] -= 100 * (wrapped[a] != wrapped[b])
                result.append(scores.softmax(1) @ v[:, part])
            result = torch.cat(result, dim=1) @ attn.proj.weight.T + attn.proj.bias
            for origin, token in zip(origins, result, strict=True):
                attended[origin] = token
    x = x + attended[:h, :w]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    hidden = (normed * block.norm2.weight + block.norm2.bias) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_fpn_is_laterals_nearest_sums_and_3x3():
    torch.manual_seed(0)
    pyramid, maps = randomised(FPN(CHANNELS, 6)), some_maps(batch=2)
    with torch.no_grad():
        for output, level, actual in zip(pyramid.outputs, slow_top_down(pyramid, maps), pyramid(maps), strict=True):
            torch.testing.assert_close(actual, F.conv2d(level, output.weight, output.bias, padding=1))


@pytest.mark.parametrize("fused", [True, False])
def test_fpnt_is_window_attention_written_out(fused):
    torch.manual_seed(0)
    window, num_heads, sizes = 4, 2, [(7, 9), (4, 5), (2, 3)]  # 7 x 9 pads to 8 x 12; 2 x 3 is less than a window
    pyramid = randomised(FPNT([5, 6, 7], 6, num_layers=3, num_heads=num_heads, window_size=window)).double()
    maps = [torch.randn(1, C, h, w, dtype=torch.double) for C, (h, w) in zip([5, 6, 7], sizes, strict=True)]
    for module in pyramid.modules():
        if hasattr(module, "fused_attn"):
            assert module.fused_attn  # the default
            module.fused_attn = fused
    with torch.no_grad():
        for blocks, level, actual in zip(pyramid.outputs, slow_top_down(pyramid, maps), pyramid(maps), strict=True):
            expected = level[0].permute(1, 2, 0)
            for block, shift in zip(blocks, [0, 2, 0], strict=True):
                expected = slow_window_block(block, expected, window, shift, num_heads)
            torch.testing.assert_close(actual[0].permute(1, 2, 0), expected)


def test_layer_norm_eps_is_1e_5():
    norms = [module for module in FPNT([4], 4, num_layers=2).modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-5] * 4


def test_window_of_one_cell_never_shifts():
    pyramid = FPNT([4], 4, num_layers=2, window_size=1).eval()
    x = torch.randn(1, 4, 3, 5)
    flipped = pyramid([x.flip(2, 3)])[0].flip(2, 3)  # positions do not matter
    torch.testing.assert_close(pyramid([x])[0], flipped)


def test_drop_path_drops_both_parts():
    pyramid = FPNT([4], 4, num_layers=2, drop_path_rate=0.999999)
    x = [torch.randn(2, 4, 5, 6)]
    torch.testing.assert_close(pyramid.train()(x)[0], pyramid.laterals[0](x[0]))
    assert not torch.allclose(pyramid.eval()(x)[0], pyramid.laterals[0](x[0]))


# ---------------------------------------------------------------- sizes, parameters, initialisation


@pytest.mark.parametrize(
    ("width", "num_heads"), [(512, 8), (256, 4), (96, 1), (160, 2), (200, 2), (224, 2), (210, 3), (6, 1)]
)
def test_default_num_heads(width, num_heads):
    with torch.device("meta"):
        assert FPNT([4], width).outputs[0][0].attn.num_heads == num_heads


def test_parameters_are_as_published():
    with torch.device("meta"):
        neck = FPNT([256, 512, 1024, 2048])  # ResNet-50
        fpn = FPN([256, 512, 1024, 2048])
    assert sum(p.numel() for p in neck.parameters()) == pytest.approx(14.6e6, rel=0.005)
    assert sum(p.numel() for p in fpn.parameters()) == 3840 * 256 + 4 * 256 + 4 * (9 * 256 * 256 + 256)


def test_initialisation_is_the_published():
    torch.manual_seed(0)
    for pyramid in (FPN([64, 128], 64), FPNT([64, 128], 64, num_layers=2)):
        for name, parameter in pyramid.named_parameters():
            values = parameter.detach()
            if isinstance(pyramid.get_submodule(name.rpartition(".")[0]), nn.Conv2d) and name.endswith("weight"):
                fan_in, fan_out = values[0].numel(), values[:, 0].numel()
                bound = (6 / (fan_in + fan_out)) ** 0.5
                assert 0.98 * bound < float(values.abs().max()) <= bound
                assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
            elif name.endswith("bias"):
                assert not values.any()
            elif "norm" in name:
                assert (values == 1).all()
            else:
                assert float(values.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", ["fpn", "fpnt"])
@pytest.mark.parametrize("num_outputs", [1, 2, 4, None])
def test_num_outputs_are_the_finest_of_the_whole(name, num_outputs):
    torch.manual_seed(0)
    whole, maps = BUILDS[name]().eval(), some_maps()
    part = BUILDS[name](num_outputs=num_outputs).eval()
    count = num_outputs or 4
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert bool(unexpected) == (count < 4)  # the other levels' layers are not built
    assert len(part.channels) == len(part(maps)) == count
    assert part.channels == [6] * count
    assert part.output_strides([4, 8, 16, 32]) == [4, 8, 16, 32][:count]
    for actual, expected in zip(part(maps), whole(maps), strict=False):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_num_outputs_of_the_simple_pyramid(num_outputs):
    whole, part, maps = BUILDS["simple"]().eval(), BUILDS["simple"](num_outputs=num_outputs).eval(), some_maps()
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert unexpected
    assert part.output_strides([4, 8, 16, 32]) == [4, 8, 16][:num_outputs]
    for actual, expected in zip(part(maps), whole(maps)[:num_outputs], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("stride", "strides", "sizes"),
    [  # of a map of 5 x 7
        (16, [4, 8, 16, 32], [(20, 28), (10, 14), (5, 7), (3, 4)]),
        (14, [3.5, 7, 14, 28], [(20, 28), (10, 14), (5, 7), (3, 4)]),
        (8, [4, 8, 16, 32], [(10, 14), (5, 7), (3, 4), (2, 2)]),
        (32, [4, 8, 16, 32], [(40, 56), (20, 28), (10, 14), (5, 7)]),
        (4, [4, 8, 16, 32], [(5, 7), (3, 4), (2, 2), (1, 1)]),
        (1, [4, 8, 16, 32], [(2, 2), (1, 1), (1, 1), (1, 1)]),
        (10, [5, 10, 20, 40], [(10, 14), (5, 7), (3, 4), (2, 2)]),
    ],
)
def test_simple_pyramid_comes_nearest_to_4_8_16_32(stride, strides, sizes):
    pyramid = SimplePyramid([9], 6, stride=stride)
    assert pyramid.output_strides([stride]) == strides
    assert pyramid.channels == [6] * 4
    outputs = pyramid([torch.randn(2, 9, 5, 7)])
    assert [level.shape for level in outputs] == [(2, 6, h, w) for h, w in sizes]


def test_simple_pyramid_is_vitdets():
    """The published layers, in the published order; the map is pooled in 2 x 2, the rest of an odd one kept."""
    torch.manual_seed(0)
    pyramid = randomised(SimplePyramid([8], 4, stride=16))
    x = torch.randn(1, 8, 3, 5)

    def norm(x, layer):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], layer.weight, layer.bias, 1e-6).movedim(-1, 1)

    def smooth(x, reduce, norm1, conv, norm2):
        x = norm(F.conv2d(x, reduce.weight), norm1)
        return norm(F.conv2d(x, conv.weight, padding=1), norm2)

    def double(x, up):  # no overlap: each cell becomes 2 x 2
        B, _, h, w = x.shape
        doubled = torch.einsum("bchw,cdij->bdhiwj", x, up.weight).reshape(B, -1, 2 * h, 2 * w)
        return doubled + up.bias[:, None, None]

    four, two, one, half = pyramid.outputs
    middle = F.gelu(norm(double(x, four[0]), four[1]))
    assert middle.shape == (1, 4, 6, 10)
    assert four[3].weight.shape == (4, 2, 2, 2)
    windows = F.pad(x, (0, 1, 0, 1), value=-torch.inf).unfold(2, 2, 2).unfold(3, 2, 2)
    expected = [
        smooth(double(middle, four[3]), *four[4:]),
        smooth(double(x, two[0]), *two[1:]),
        smooth(x, *one),
        smooth(windows.amax((4, 5)), *half[1:]),
    ]
    for actual, level in zip(pyramid([x]), expected, strict=True):
        torch.testing.assert_close(actual, level)
    assert sum(isinstance(module, nn.Conv2d) and module.bias is not None for module in pyramid.modules()) == 0


def test_simple_pyramid_of_many_maps_uses_the_last():
    maps = [torch.full((1, 3, 2, 3), torch.nan), torch.randn(1, 5, 2, 3)]
    pyramid = SimplePyramid([3, 5], 4)
    assert all(level.isfinite().all() for level in pyramid(maps))
    assert pyramid.output_strides([16, 14]) == [3.5, 7, 14, 28]


# ---------------------------------------------------------------- what all pyramids owe


@ALL
def test_registry(name):
    assert issubclass(PYRAMIDS[name], Pyramid)
    assert "num_outputs" in inspect.signature(PYRAMIDS[name]).parameters


@ALL
@pytest.mark.parametrize("sizes", [SIZES, [(1, 1)] * 4, [(5, 3), (3, 2), (2, 1), (1, 1)]])
def test_channels_and_strides_are_true(name, sizes):
    pyramid = BUILDS[name]()
    assert pyramid.in_channels == CHANNELS
    maps = [torch.randn(2, C, h, w) for C, (h, w) in zip(CHANNELS, sizes, strict=True)]
    outputs = pyramid(maps)
    if name == "simple":
        h, w = sizes[-1]
        sizes = [(8 * h, 8 * w), (4 * h, 4 * w), (2 * h, 2 * w), (h, w)]
    assert [level.shape for level in outputs] == [
        (2, C, *size) for C, size in zip(pyramid.channels, sizes, strict=True)
    ]
    assert pyramid.output_strides([4, 8, 16, 32]) == [4, 8, 16, 32]


@ALL
def test_one_channel(name):
    outputs = PYRAMIDS[name]([1], 1)([torch.randn(1, 1, 3, 2)])
    assert all(level.shape[:2] == (1, 1) for level in outputs)


@ALL
@pytest.mark.parametrize("num_outputs", [None, 1])
def test_gradients_reach_every_parameter_and_map(name, num_outputs):
    torch.manual_seed(0)
    pyramid, maps = randomised(BUILDS[name](num_outputs=num_outputs)), some_maps()
    for level in maps:
        level.requires_grad_()
    sum((level * torch.randn_like(level)).sum() for level in pyramid(maps)).backward()
    assert [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()] == []
    used = maps[-1:] if name == "simple" else maps
    assert all(level.grad is not None and level.grad.any() for level in used)


@ALL
def test_batch_equals_single(name):
    pyramid, maps = randomised(BUILDS[name]()), some_maps(batch=3)
    singles = [pyramid([level[i : i + 1] for level in maps]) for i in range(3)]
    for i, level in enumerate(pyramid(maps)):
        torch.testing.assert_close(level, torch.cat([single[i] for single in singles]))


@ALL
def test_exports_and_compiles(name):
    pyramid, maps = randomised(BUILDS[name]()), some_maps()
    with torch.no_grad():
        exported = torch.export.export(pyramid, (maps,)).module()
        compiled = torch.compile(pyramid, backend="eager", fullgraph=True)
        for inputs in (maps, some_maps()):  # nothing of the first input is left in the graph
            torch.testing.assert_close(exported(inputs), pyramid(inputs))
            torch.testing.assert_close(compiled(inputs), pyramid(inputs))


@ALL
def test_follows_the_size_of_the_maps(name):
    """A module that has seen one size gives on another what a fresh copy gives."""
    pyramid, fresh = randomised(BUILDS[name]()), BUILDS[name]().eval()
    fresh.load_state_dict(pyramid.state_dict())
    other = [torch.randn(2, C, h, w) for C, (h, w) in zip(CHANNELS, [(8, 9), (4, 5), (2, 3), (1, 2)], strict=True)]
    with torch.no_grad():
        pyramid(some_maps())
        torch.testing.assert_close(pyramid(other), fresh(other))


def test_compiled_window_blocks_follow_the_size():
    pyramid = randomised(FPNT([4], 6, num_layers=2, num_heads=2, window_size=3))
    compiled = torch.compile(pyramid, backend="eager", fullgraph=True)
    with torch.no_grad():
        for shape in [(1, 4, 7, 8), (2, 4, 5, 4), (1, 4, 6, 9)]:  # the second compiles for any size
            x = torch.randn(shape)
            torch.testing.assert_close(compiled([x]), pyramid([x]))


@ALL
def test_half_precision(name):
    torch.manual_seed(0)
    pyramid, maps = BUILDS[name](), some_maps()
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


# ---------------------------------------------------------------- errors


@ALL
def test_bad_in_channels_are_named(name):
    cls = PYRAMIDS[name]
    with pytest.raises(ValueError, match=rf"{cls.__name__} takes a list of maps: in_channels must list .*; got \[\]"):
        cls([])
    with pytest.raises(ValueError, match="in_channels must list their channels; got 64"):
        cls(64)
    with pytest.raises(ValueError, match=r"in_channels and out_channels must be 1 or more; got \[4, 0\] and 6"):
        cls([4, 0], 6)
    with pytest.raises(ValueError, match=r"in_channels and out_channels must be 1 or more; got \[4\] and 0"):
        cls([4], 0)


@ALL
@pytest.mark.parametrize("num_outputs", [0, -1, 5])
def test_bad_num_outputs_is_named(name, num_outputs):
    with pytest.raises(ValueError, match=f"num_outputs must be from 1 to 4, the number of levels; got {num_outputs}"):
        BUILDS[name](num_outputs=num_outputs)


@ALL
def test_bad_maps_are_named(name):
    pyramid, maps = BUILDS[name](), some_maps()
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


@ALL
def test_bad_strides_are_named(name):
    with pytest.raises(ValueError, match=r"strides must be 4, one per map that comes in; got \[8, 16\]"):
        BUILDS[name]().output_strides([8, 16])


def test_bad_options_are_named():
    for num_heads in (0, 4):
        with pytest.raises(ValueError, match=f"num_heads must divide out_channels 6; got {num_heads}"):
            FPNT([4], 6, num_heads=num_heads)
    with pytest.raises(ValueError, match="num_layers and window_size must be 1 or more; got 0 and 7"):
        FPNT([4], 6, num_layers=0)
    with pytest.raises(ValueError, match="num_layers and window_size must be 1 or more; got 1 and 0"):
        FPNT([4], 6, window_size=0)
    with pytest.raises(ValueError, match="stride must be 1 or more pixels; got 0.5"):
        SimplePyramid([4], stride=0.5)
