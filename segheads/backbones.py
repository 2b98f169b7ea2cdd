"""Every timm architecture as a list of feature maps: the one place that knows that backbones differ."""

import difflib
import inspect
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.layers import LayerNorm2d, resample_abs_pos_embed
from timm.models import group_parameters
from timm.models._input import get_model_input_config  # no public spelling; timm >= 1.0.31
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import auto_group_layers  # for architectures without a group_matcher; no public spelling
from torch import Tensor, nn
from typing_extensions import Self

from segheads.errors import PretrainedWeightsError
from segheads.functional.shapes import crop, is_dynamic, whole
from segheads.modules import evaluating, freeze_unused, modules_before_learning, parameters_behind
from segheads.pretrained import create_timm_model, few, find_weights, log_of_missing_keys
from segheads.swin import pad_before_shift

# A family is the name of timm's model file. What a sweep over all 1,371 architectures of timm 1.0.31 found:
NO_FINAL_NORM = {"hiera", "hieradet_sam2"}  # forward_intermediates asserts norm=False: their norm follows the pooling
# timm says "fixed input size", which holds for the classifier or not at all
ANY_SIZE_THOUGH_FLAGGED = {"byobnet", "efficientvit_msra", "sequencer", "swiftformer", "twins", "vitamin", "xcit"}
# architectures with halo or bottleneck attention: tables of the built size, or blocks that must divide it
FIXED_THOUGH_NOT_FLAGGED = {
    *("bat_resnext26ts", "eca_halonext26ts", "halonet26t", "halonet50ts", "halonet_h1", "haloregnetz_b"),
    "sehalonet33ts",
}
RESIZED_ON_LOAD = {  # built at img_size even with weights, which timm's loader resamples; so is hiera's abswin
    *("coat", "deit", "eva", "mvitv2", "tnt", "vision_transformer", "vision_transformer_hybrid"),
}
SQUARE_ONLY = {"mvitv2"}  # img_size (H, W) becomes the square of the longer side
THREE_CHANNELS = {"csatv2"}  # its colour transform needs RGB: a 1x1 convolution goes in front
# (H, W) in pixels that unpadded convolutions need
SMALLEST = {"inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96}


class TimmBackbone(nn.Module):
    """Any timm architecture as a function from images to feature maps, fine to coarse.

    The plain timm model is built without its classifier; the blocks behind the last map are cut off and parameters that
    no map depends on are frozen, so that DDP works. Images of any size go in: they are padded with zeros at the right
    and the bottom to a multiple of the strides, or resized where an architecture's weights are bound to one size. The
    maps come back at `ceil(size / stride)`, without class, register or distillation tokens unless `class_token` is set.

    The last map has gone through the norm with which the model's `forward_features` ends. In a plain ViT every map
    goes through it (as in DINOv2's segmentation code; mmsegmentation normalises the last map alone). A norm that the
    model applies after pooling only (ConvNeXt, or a ViT's `fc_norm`, as in BEiT) belongs to the classifier and is gone.

    Args:
        name: An architecture of `timm.list_models()`, with a tag for particular weights
            (`vit_tiny_patch16_224.augreg_in21k`), or timm's `hf-hub:OWNER/NAME`.
        pretrained: `True` for timm's weights, `False` for random ones, or the path of a checkpoint that timm can read
            (`.safetensors`, `.pth`, `.npz` of the AugReg and big_vision ViTs) or of a saved model's folder. What
            trainers add is understood: `{"state_dict": ...}`, `{"ema": ...}`, names that begin with `module.`,
            `model.`, `encoder.`, `backbone.` or `teacher.`.
        in_chans: Channels of the images; timm adapts pretrained weights to it.
        img_size: Size in pixels for which position embeddings and windows are built; `None` is the native one.
            Architectures without such a size take any image and ignore it.
        drop_path_rate: Stochastic depth, with a warning where the architecture has none.
        levels: `None` for every native level (the last block alone in an architecture with one stride, such as ViT);
            else the coarsest `levels` levels, or so many evenly spaced blocks that end with the last.
        pos_embed_resize: How a plain ViT's position embedding follows the image's grid: `"timm"` (bicubic with
            antialiasing), `"bilinear"` (published Segmenter) or `"bicubic"` (mmsegmentation and MeanShifter). The
            published code leaves a grid of another shape but the same number of patches as it is; here it is resized.
        norm_eps: The eps of every LayerNorm; `None` leaves the architecture's own (1e-6 in timm's ViTs; 1e-5 in the
            published Segmenter).
        model_kwargs: More arguments for `timm.create_model`.
        level_norms: A LayerNorm of its own over the channels of each map, in place of the final norm alone, as
            MMSegmentation, transformers and SenFormer put behind Swin and ConvNeXt; its eps is `norm_eps`, or 1e-5.
        swin_padding: Whether a Swin shifts a map before it pads it to whole windows (`"timm"`) or after, as
            `"published"`, which matters where windows do not cover the map.
        dilation: How a ResNet of `model_kwargs={"output_stride": 8}` or 16 is dilated: in a stage's first block as in
            the stage before (`"timm"`), or in the whole stage alike (`"smp"`, segmentation-models-pytorch's own).
        max_stride: Leaves out what is coarser, and the stages behind it; `None` for all.
        every_stage: Whether stages of one stride, as in a dilated ResNet, give a map each, or the last of them alone.
        final_norm: Whether maps go through the model's final norm, as above; the published DPT takes them without.
        class_token: Whether the class token stands behind each cell, as further channels of every map: twice as many,
            which the published DPT and DINOv2's linear probes of whole images read.

    Shape:
        - Input: images `(B, in_chans, H, W)`, any `H` and `W`.
        - Output: list of `(B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))`.

    Attributes:
        channels: Channels of each map.
        strides: Pixels per cell of each map.
        num_stages: How many stages there are to freeze, see `freeze`.
        licence: Of the weights that timm gave, where it tells; None of others, and of a saved model.
        data_config: Mean, std, input size, interpolation as timm has them, ready for JSON. With other than 3 channels
            mean and std are timm's averages.

    Raises:
        ValueError: For an unknown name, levels that are not there, or a `pos_embed_resize`, `swin_padding`,
            `dilation`, `max_stride` or `class_token` that cannot be.
        FileNotFoundError: If `pretrained` is the path of no file.
        PretrainedWeightsError: If weights are missing, out of reach or do not fit.

    Examples:
        >>> backbone = TimmBackbone("test_convnext", pretrained=False)
        >>> backbone.channels, backbone.strides
        ([24, 32, 48, 64], [4, 8, 16, 32])
        >>> [tuple(features.shape) for features in backbone(torch.zeros(1, 3, 37, 51))]
        [(1, 24, 10, 13), (1, 32, 5, 7), (1, 48, 3, 4), (1, 64, 2, 2)]
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool | str | Path = True,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        levels: int | None = None,
        pos_embed_resize: Literal["timm", "bilinear", "bicubic"] = "timm",
        norm_eps: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        level_norms: bool = False,
        swin_padding: Literal["timm", "published"] = "timm",
        dilation: Literal["timm", "smp"] = "timm",
        max_stride: int | None = None,
        every_stage: bool = False,
        final_norm: bool = True,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_chans = in_chans
        self._frozen: set[str] = set()  # names of the modules that stay in evaluation mode
        self._stages: list[int] = []  # indices of timm's maps
        size = (img_size, img_size) if isinstance(img_size, int) else img_size and (img_size[0], img_size[1])
        family = _family(name)
        rgb_only = family in THREE_CHANNELS and in_chans != 3
        options: dict[str, Any] = {"dynamic_img_size": True, "in_chans": 3 if rgb_only else in_chans}
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        if size and (pretrained is False or family in RESIZED_ON_LOAD or "abswin" in name):
            options["img_size"] = (max(size), max(size)) if family in SQUARE_ONLY else size
        if family == "gemma4_vit" and name.split(".")[0].endswith("_enc"):
            options["global_pool"] = "none"  # the default pooling wants multiples of 48 pixels
        source, weights = find_weights(name, pretrained)
        with log_of_missing_keys() as (missing, unexpected):
            self.model: Any = create_timm_model(name, options | (model_kwargs or {}), weights, source)
        architecture = self.model.pretrained_cfg["architecture"]
        family = _family(architecture)  # which a name such as hf-hub:OWNER/NAME does not tell beforehand

        # (H, W) that the weights are bound to, or None: any size
        self.fixed_size = _fixed_size(self.model, family, architecture)
        resize = getattr(self.model, "set_input_size", None)
        if size and self.fixed_size not in (None, size) and resize is not None:
            with warnings.catch_warnings():  # timm's resizing of tables sets off hundreds of torch's notes on style
                warnings.filterwarnings("ignore", "torch.searchsorted|Using a non-tuple sequence", UserWarning)
                resize(img_size=size)
            self.fixed_size = size
        if size and self.fixed_size not in (None, size):
            warnings.warn(f"{name} is bound to images of {self.fixed_size}, not {size}; they are resized", stacklevel=2)
        self.to_rgb = nn.Conv2d(in_chans, 3, 1) if rgb_only else nn.Identity()
        if norm_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps
        if pos_embed_resize != "timm":
            _resize_pos_embed_as_published(self.model, name, pos_embed_resize)
        if swin_padding not in ("timm", "published"):
            raise ValueError(f"swin_padding must be 'timm' or 'published'; got {swin_padding!r}")
        if swin_padding == "published" and not pad_before_shift(self.model):
            raise ValueError(f"swin_padding='published' needs a Swin, which {name} is not; leave it at 'timm'")
        if dilation not in ("timm", "smp"):
            raise ValueError(f"dilation must be 'timm' or 'smp'; got {dilation!r}")
        if dilation == "smp":
            if not isinstance(self.model, ResNet):
                raise ValueError(f"dilation='smp' needs a ResNet, which {name} is not; leave it at 'timm'")
            _dilate_whole_stages(self.model)

        self.smallest = SMALLEST.get(family, 1)
        self.final_norm = final_norm and family not in NO_FINAL_NORM and not level_norms
        if class_token and not _has_class_token(self.model):
            raise ValueError(f"class_token needs a ViT with a class token, which {name} has not; leave it out")
        self.class_token = class_token
        self.norms = nn.ModuleList()  # of the maps, if there are any
        self.is_exact = False  # a graph for any size is exported: its maps are known to need no resizing
        self.indices, self.strides, self.channels = self._choose_levels(levels, max_stride, every_stage)
        if level_norms:
            self.norms.extend(LayerNorm2d(C, eps=norm_eps or 1e-5) for C in self.channels)
        lost = sorted(missing & self.model.state_dict().keys())
        if lost:
            shown = few(lost) + (f"; what it has besides: {few(sorted(unexpected))}" if unexpected else "")
            raise PretrainedWeightsError(
                f"{source} lacks {len(lost)} of the weights of {name} ({shown}); pass a checkpoint of this "
                "architecture, or pretrained=False for random weights"
            )
        self.licence: str | None = self.model.pretrained_cfg.get("license") if pretrained is True else None
        self.data_config = _data_config(self.model, in_chans)

    def _choose_levels(
        self, levels: int | None, max_stride: int | None, every_stage: bool
    ) -> tuple[list[int], list[int], list[int]]:
        """Indices, strides and channels of the levels; what they do not need is cut off or frozen."""
        reductions = [int(info["reduction"]) for info in self.model.feature_info]
        self.indices = list(range(len(reductions)))
        with torch.no_grad():
            size, maps = self._probe(max(reductions))
        strides = [_true_stride(size[1], x.shape[3], r) for x, r in zip(maps, reductions, strict=True)]
        of_stride: dict[int, list[int]] = {}
        for index, stride in enumerate(strides):
            if stride <= (max_stride or stride):
                of_stride.setdefault(stride, []).append(index)
        if len(set(strides)) > 1:
            of_stride.pop(1, None)  # dla, vgg and some cspnets start at full resolution
        if not of_stride:
            raise ValueError(f"max_stride must be a stride of {self.name}, {sorted(set(strides))}; got {max_stride}")
        if len(set(strides)) > 1:
            chosen = [i for stride in sorted(of_stride) for i in of_stride[stride][0 if every_stage else -1 :]]
            available, kind = len(chosen), "levels"
            self._stages = [index for index in chosen if strides[index] >= 4] or chosen
            count = available if levels is None else levels
        else:
            available, kind = len(strides), "blocks"
            self._stages = list(range(available))
            count = 1 if levels is None else levels
            chosen = [round((i + 1) * available / count) - 1 for i in range(count)] if count > 0 else []
        if not 1 <= count <= available:
            raise ValueError(f"levels must be 1 to {available}, the {kind} of {self.name}, but is {count}; pass fewer")
        self.indices = chosen[-count:]
        with torch.random.fork_rng(devices=[]):
            self.model.prune_intermediate_layers(self.indices)
        maps = self._freeze_unneeded(max(reductions))
        return self.indices, [strides[i] for i in self.indices], [x.shape[1] for x in maps]

    def keep_coarsest(self, count: int) -> None:
        """Give only the coarsest `count` levels from now on; all of them where there are no more.

        Args:
            count: Number of levels, 1 or more.

        Raises:
            ValueError: If `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be 1 or more; got {count}")
        if count >= len(self.indices):
            return
        self.indices, self.strides, self.channels = (x[-count:] for x in (self.indices, self.strides, self.channels))
        self.norms = self.norms[-count:]
        self._freeze_unneeded(max(self.strides))

    @property
    def num_stages(self) -> int:
        """Number of stages that `freeze` can be asked for."""
        return len(self._stages)

    def freeze(self, stages: int | None = None) -> None:
        """Freeze the stem and the first stages, or everything: no gradients, and evaluation mode whatever is asked.

        A stage ends with a map: of the levels those at stride 4 and coarser, and of an architecture with one stride
        every block. Frozen is all that the maps of the first stages depend on, which in an architecture of parallel
        branches (HRNet) may be nearly everything. Batch norms keep their statistics, and no path, patch or unit is
        dropped before the first weight that learns. No activations are kept for what is frozen.

        Args:
            stages: How many, 1 to `num_stages`; None means all of the backbone, with what follows the last stage.

        Raises:
            ValueError: If there are not so many stages.

        Examples:
            >>> backbone = TimmBackbone("test_convnext", pretrained=False)
            >>> backbone.freeze(2)
            >>> learning = [name for name, p in backbone.named_parameters() if p.requires_grad]
            >>> backbone.num_stages, sorted({name.split(".")[2] for name in learning})
            (4, ['2', '3'])
        """
        if stages is None:
            self.requires_grad_(False)
            self._frozen = {name for name, _ in self.named_modules()}
        else:
            if not 1 <= stages <= self.num_stages:
                raise ValueError(
                    f"freeze_stages must be at most {self.num_stages}, the number of stages of {self.name}; "
                    f"got {stages}"
                )
            images = self._probe_images(max(self.strides))
            with evaluating(self, grad=True), torch.random.fork_rng(devices=[]):
                maps = self._maps(images, self._stages[:stages], norm=False)
            behind = parameters_behind(maps)
            for parameter in self.parameters():
                if id(parameter) in behind:
                    parameter.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                self._frozen |= modules_before_learning(self, lambda: self._maps(images))
        self.train(self.training)

    def layers(self) -> dict[str, int]:
        """The layer of each parameter by its name, 0 at the images, as timm groups them for layer-wise rates.

        Examples:
            >>> layers = TimmBackbone("test_vit", pretrained=False).layers()
            >>> layers["model.patch_embed.proj.weight"], layers["model.blocks.5.mlp.fc2.weight"]
            (0, 6)
        """
        matcher = getattr(self.model, "group_matcher", None)
        found = auto_group_layers(self.model)
        if matcher is not None:
            found = group_parameters(self.model, matcher(coarse=False), reverse=True)
        own = dict.fromkeys((f"to_rgb.{name}" for name, _ in self.to_rgb.named_parameters()), 0)
        last = dict.fromkeys((f"norms.{name}" for name, _ in self.norms.named_parameters()), max(found.values()))
        return {**own, **{f"model.{name}": layer for name, layer in found.items()}, **last}

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; what is frozen stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).training = False
        return self

    def _freeze_unneeded(self, reduction: int) -> list[Tensor]:
        """Freeze parameters that no map depends on: DDP stops without their gradients. Returns the maps looked at.

        Such are left by timm's pruning, for example the norms of the other scales in coat.
        """
        return freeze_unused(self, lambda: self._probe(reduction)[1])

    def _probe(self, reduction: int) -> tuple[tuple[int, int], list[Tensor]]:
        """One run in eval mode on the smallest image that tells: shapes, and what depends on what."""
        with evaluating(self, grad=torch.is_grad_enabled()), torch.random.fork_rng(devices=[]):
            return self.small_size(reduction), self._maps(self._probe_images(reduction))

    def _probe_images(self, reduction: int) -> Tensor:
        device = next(self.parameters()).device
        return torch.zeros(1, self.in_chans, *self.small_size(reduction), device=device)

    def gives_exact_grids(self) -> bool:
        """Whether images of whole multiples of the strides give maps of exactly `size / stride` cells.

        Tried on two sizes. `is_exact` says it to `forward`, for graphs of any size, where no size can be compared.
        """
        if self.fixed_size is not None:
            return False
        multiple, like = math.lcm(*self.strides), next(self.parameters())
        with evaluating(self), torch.random.fork_rng(devices=[]):
            for cells in ((3, 5), (4, 7)):
                size = [whole(n * multiple, multiple, self.smallest) for n in cells]
                maps = self._maps(torch.zeros(1, self.in_chans, *size, device=like.device, dtype=like.dtype))
                grids = [tuple(n // stride for n in size) for stride in self.strides]
                if [tuple(x.shape[-2:]) for x in maps] != grids:
                    return False
        return True

    def small_size(self, stride: int | None = None) -> tuple[int, int]:
        """Height and width of a small image that tells all about the maps, given the coarsest stride."""
        # 5 cells wide: enough for maps that come some pixels short (inception) to show their stride
        stride = max(self.strides) if stride is None else stride
        return self.fixed_size or (max(3 * stride, self.smallest), max(5 * stride, self.smallest))

    def _maps(self, images: Tensor, indices: list[int] | None = None, *, norm: bool = True) -> list[Tensor]:
        maps = self.model.forward_intermediates(
            self.to_rgb(images),
            indices=self.indices if indices is None else indices,
            norm=norm and self.final_norm,
            intermediates_only=True,
            output_fmt="NCHW",
            **({"return_prefix_tokens": True} if self.class_token else {}),
        )
        if self.class_token:  # of the tokens without a place the first
            maps = [torch.cat([x, tokens[:, 0, :, None, None].expand_as(x)], 1) for x, tokens in maps]
        if indices is None and len(self.norms):
            return [normalise(x) for normalise, x in zip(self.norms, maps, strict=True)]
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """The feature maps of the images, fine to coarse.

        Raises:
            ValueError: If the images are not `(B, in_chans, H, W)`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must be (B, {self.in_chans}, H, W), but are {tuple(images.shape)}; "
                "add the batch axis or build the backbone with another in_chans"
            )
        height, width = images.shape[-2:]
        if self.fixed_size is None:
            multiple = math.lcm(*self.strides)
            covered = tuple(whole(n, multiple, self.smallest) for n in (height, width))
            images = F.pad(images, (0, covered[1] - width, 0, covered[0] - height))
        else:
            covered = (height, width)
            if covered != self.fixed_size:
                images = F.interpolate(images, self.fixed_size, mode="bilinear", align_corners=False, antialias=True)
        features = []
        for x, stride in zip(self._maps(images), self.strides, strict=True):
            grid = ((covered[0] + stride - 1) // stride, (covered[1] + stride - 1) // stride)
            # fixed sizes; inception and xception lose pixels at the rim. A graph for any size can not look.
            if not self.is_exact and (is_dynamic(height, width) or tuple(x.shape[-2:]) != grid):
                x = F.interpolate(x, grid, mode="bilinear", align_corners=False)
            features.append(crop(x, (height + stride - 1) // stride, (width + stride - 1) // stride))
        return features

    def extra_repr(self) -> str:  # noqa: D102 (nn.Module's)
        return f"{self.name!r}, channels={self.channels}, strides={self.strides}"


def _family(name: str) -> str:
    """The model file of an architecture; hub and folder names have none before they are read."""
    if ":" in name:
        return ""
    if not timm.is_model(name):
        architecture = name.split(".")[0]
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() shows all"
        raise ValueError(f"name must be one of timm's {len(timm.list_models())} architectures, but is {name!r}; {hint}")
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def _fixed_size(model: nn.Module, family: str, architecture: str) -> tuple[int, int] | None:
    config = get_model_input_config(model)
    flagged = config["fixed_input_size"] and family not in ANY_SIZE_THOUGH_FLAGGED
    if not (flagged or architecture in FIXED_THOUGH_NOT_FLAGGED):
        return None
    return tuple(config["input_size"][-2:])


def _true_stride(pixels: int, cells: int, reduction: int) -> int:
    """The stride of a map: what timm's feature_info says, unless the map has too few or too many cells for it."""
    ratio = pixels / cells
    fits = cells == math.ceil(pixels / reduction) or reduction <= ratio < 2 * reduction
    return reduction if fits else round(ratio)


def _data_config(model: nn.Module, in_chans: int) -> dict[str, Any]:
    config = resolve_model_data_config(model)
    config["input_size"] = (in_chans, *get_model_input_config(model)["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != in_chans:
            config[key] = [sum(config[key]) / len(config[key])] * in_chans
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _has_class_token(model: Any) -> bool:
    takes = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    return takes and getattr(model, "cls_token", None) is not None


def _dilate_whole_stages(model: Any) -> None:
    """Give the first block of a dilated stage the stage's dilation, where timm leaves that of the stage before."""
    for stage in (model.layer2, model.layer3, model.layer4):
        layers = [layer for layer in stage.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1]
        rate = max(layer.dilation[0] for layer in layers)
        for layer in layers:
            if rate > 1:
                layer.dilation, layer.padding = (rate, rate), (layer.kernel_size[0] // 2 * rate,) * 2


def _resize_pos_embed_as_published(model: Any, name: str, mode: str) -> None:
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"pos_embed_resize must be 'timm', 'bilinear' or 'bicubic', but is {mode!r}")
    if type(model) not in (VisionTransformer, VisionTransformerDistilled) or model.pos_embed is None:
        raise ValueError(
            f"pos_embed_resize={mode!r} needs a plain ViT with a learned position embedding, but {name} is a "
            f"{type(model).__name__}; leave it at 'timm'"
        )
    model._pos_embed = partial(_pos_embed, model, mode)


def _pos_embed(vit: Any, mode: str, x: Tensor) -> Tensor:
    """The `_pos_embed` of timm's ViTs with another interpolation; like timm's it is computed in float32."""
    B, H, W, _ = x.shape
    tokens = [vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token]
    prefix = [token.expand(B, -1, -1) for token in tokens if token is not None]
    h, w = vit.patch_embed.grid_size
    first = vit.pos_embed.shape[1] - h * w  # of other tokens, which have no place
    position = resample_abs_pos_embed(vit.pos_embed, [H, W], [h, w], first, interpolation=mode, antialias=False)
    x = x.flatten(1, 2)  # (B, h, w, D) -> (B, N, D)
    x = torch.cat([*prefix, x + position], 1) if vit.no_embed_class else torch.cat([*prefix, x], 1) + position
    return vit.pos_drop(x)
