"""The config.json of a saved model, before anything is built from it, and how much may be built."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from segheads.backbones import TimmBackbone
from segheads.heads import FCNHead, find_head
from segheads.heads.registry import DecoderEntry
from segheads.losses import LOSSES
from segheads.plan import ModelPlan
from segheads.pyramids import find_pyramid
from segheads.schema import check_fields, check_options, check_value, short, short_name

# What of `backbone_kwargs.model_kwargs` reaches timm: sizes, rates and switches of an architecture; no file, no
# address, no other configuration. Values are numbers, switches, names without slash and colon, and lists of these.
# fmt: off
TIMM_ARGUMENTS = frozenset([
    "act_layer", "attn_drop_rate", "attn_head_dim_reduction", "attn_ratio", "avg_down", "base_dim", "base_width",
    "bottle_ratio", "cardinality", "channel_multiplier", "channels", "class_token", "conv_bias", "conv_mlp",
    "depth", "depths", "dim", "dims", "distilled", "down_kernel_size", "downsamples", "drop_block_rate",
    "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims", "expand_ratio",
    "fc_norm", "final_norm", "fix_init", "focal_levels", "focal_windows", "global_block_counts", "global_pool",
    "groups", "growth_rate", "head_dim", "heads", "hidden_sizes", "img_size", "init_values", "kernel_size",
    "kernel_sizes", "key_dim", "layer_scale_init_value", "layers", "ls_init_value", "mlp_ratio", "mlp_ratios",
    "no_embed_class", "norm_eps", "norm_layer", "num_blocks", "num_features", "num_heads", "num_init_features",
    "num_kv_heads", "num_reg_tokens", "output_stride", "patch_drop_rate", "patch_norm", "patch_size", "patch_sizes",
    "patch_stride", "pos_drop_rate", "pos_embed", "pre_norm", "proj_bias", "proj_drop_rate", "q_stride", "qk_norm",
    "qkv_bias", "qkv_fused", "reg_tokens", "rope_type", "se_ratio", "sr_ratios", "stages", "stem_chs",
    "stem_kernel_size", "stem_norm", "stem_size", "stem_type", "stem_width", "strict_img_size", "swiglu_mlp",
    "transformer_depths", "use_abs_pos", "use_abs_pos_emb", "use_rel_pos", "use_rel_pos_bias",
    "use_shared_rel_pos_bias", "version", "weight_init", "width_mult", "widths", "window_ratio", "window_size",
    "window_sizes", "zero_init_last",
])
# fmt: on
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z|\Z")
SPARE_NUMBERS, SPARE_TENSORS = 200_000_000, 4_000  # VGG is built with 119 million that no map needs


def check_plan(plan: ModelPlan, where: str = "model") -> None:
    """Refuse a plan that names what no registry has, or options that its parts do not take, in kind or size.

    Args:
        plan: From a file.
        where: The way to it, for messages.

    Raises:
        ValueError: The message begins with the entry that is wrong.
    """
    name = plan.backbone
    if not _NAME.match(name) or not timm.is_model(name):
        raise ValueError(
            f"{where}.backbone must be an architecture of timm.list_models(), with or without a tag; got {short(name)}"
        )
    check_options(plan.backbone_kwargs, TimmBackbone, f"{where}.backbone_kwargs", besides=("name", "pretrained"))
    for key, value in (plan.backbone_kwargs.get("model_kwargs") or {}).items():
        if key not in TIMM_ARGUMENTS:
            raise ValueError(
                f"{where}.backbone_kwargs.model_kwargs.{short_name(key)} is none of the arguments of timm that a file "
                "may set (segheads.untrusted.TIMM_ARGUMENTS)"
            )
        _check_plain(value, f"{where}.backbone_kwargs.model_kwargs.{key}")
    parts = {"head_kwargs": find_head(plan.head), "auxiliary_kwargs": FCNHead}
    if plan.pyramid is not None:
        parts["pyramid_kwargs"] = find_pyramid(plan.pyramid)
    for key, build in parts.items():
        if not isinstance(build, DecoderEntry):  # smp's have no annotations; they name what they do not take
            check_options(getattr(plan, key), build, f"{where}.{key}", besides=("self", "in_channels", "num_classes"))
        check_value(getattr(plan, key), dict[str, Any], f"{where}.{key}")


def check_model(values: Any, where: str = "model") -> None:
    """Refuse entries of `model` that a plan has not, or of another kind; to be called before anything reads them.

    Args:
        values: The entry of config.json.
        where: The way to it, for messages.

    Raises:
        ValueError: The message begins with the entry that is wrong.
    """
    check_fields(values, ModelPlan, where)
    for name in ("backbone", "head", "num_classes"):
        if name not in values:
            raise ValueError(f"{where}.{name} is missing")
    loss = LOSSES.get(values.get("loss", "ce"))
    if loss is not None:  # a plan builds it
        own = ("num_classes", "ignore_index", "reduction")
        check_options(values.get("loss_kwargs", {}), loss, f"{where}.loss_kwargs", besides=own)


def _check_plain(value: Any, where: str) -> None:
    """Numbers, switches, names, and lists of these."""
    if isinstance(value, dict):
        raise ValueError(f"{where} must be a number, a switch, a name, or a list of these; got a dictionary")
    if isinstance(value, str) and not _NAME.match(value):
        raise ValueError(f"{where} must be a name of letters, digits, dots and dashes; got {short(value)}")
    if isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            _check_plain(each, f"{where}[{index}]")


@contextmanager
def no_more_than(*files: str | Path) -> Iterator[None]:
    """Stop what is built inside once it has far more weights than files have: a model that they cannot fill.

    Weights are counted as parts are made, before their memory is written to.

    Args:
        *files: The safetensors files whose weights it is built for; one that cannot be read counts as empty.

    Raises:
        ValueError: The weights outgrow the files, or the memory.
    """
    numbers, tensors = (sum(counts) for counts in zip(*map(_sizes, files), strict=True))
    most_numbers, most_tensors = 4 * numbers + SPARE_NUMBERS, 4 * tensors + SPARE_TENSORS
    made, thread = [0, 0], threading.get_ident()
    words = (
        f"the model that it describes is far larger than its weights, {tensors} tensors of {numbers} numbers in all; "
        "sizes of one of the two are wrong"
    )

    def count(_module: nn.Module, _name: str, value: Tensor | None) -> None:
        if value is None or threading.get_ident() != thread:
            return
        made[0] += value.numel()
        made[1] += 1
        if made[0] > most_numbers or made[1] > most_tensors:
            raise ValueError(words)

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise ValueError(words) from error  # a single tensor larger than the memory
    finally:
        for hook in hooks:
            hook.remove()


def _sizes(path: str | Path) -> tuple[int, int]:
    """Numbers and tensors in a safetensors file, by its header."""
    try:
        with safe_open(path, "pt") as file:
            shapes: list[list[int]] = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    except Exception:  # damaged: whoever loads it says so
        return 0, 0
    count = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        count += size
    return count, len(shapes)


def check_input(values: Mapping[str, Any], where: str = "input") -> None:
    """Refuse an entry `input` of config.json that is not of the kind.

    Args:
        values: The entry.
        where: The way to it, for messages.

    Raises:
        ValueError: The message begins with the entry that is wrong.
    """
    numbers = list[float]
    kinds: dict[str, Any] = {**dict.fromkeys(("mean", "std"), numbers), "input_size": list[int], "in_chans": int}
    kinds |= {"bit_depth": int | None, "band_mean": numbers | None, "band_std": numbers | None}
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a dictionary; got {short(values)}")
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"{where}.{short_name(key)} is not known here; there are {', '.join(kinds)}")
        check_value(value, kinds[key], f"{where}.{key}")
