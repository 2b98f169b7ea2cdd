"""Learning rate and optimizer of the published training runs."""

import difflib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from segheads.backbones import TimmBackbone
from segheads.ranges import Range
from segheads.training.clipping import ClipMode, check_clipping
from segheads.training.schedules import Schedule, decayed

Warmup = Literal["linear", "segmenter"]

# Parameters of several axes, by the last part of their name, that decay would only draw to zero
NOT_DECAYED = {
    *("pos_embed", "absolute_pos_embed", "relative_position_bias_table"),
    *("cls_token", "dist_token", "reg_token", "class_embeddings"),
}

# timm's names of what torch has fused kernels for, and where they are known to work
FUSED, FUSED_ON = {"sgd", "nesterov", "momentum", "adam", "adamw"}, {"cpu", "cuda"}


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimizer, and learning rate over the run."""

    optimizer: str
    """In timm's words: sgd (which is Nesterov), momentum (which is not), adamw, and the rest."""
    learning_rate: Annotated[float, Range(0)]
    """The rate at the start of the decay."""
    backbone_lr_scale: Annotated[float, Range(0)] = 1.0
    """The backbone's rate over that of the rest."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """The rate of each of the backbone's layers over that of the next one, above 0 to 1: 0.75 halves it about every
    two layers towards the images."""
    min_learning_rate: Annotated[float, Range(0)]
    """The rate at the end of the decay."""
    power: Annotated[float, Range(0)]
    """Exponent of the decay, for poly."""
    schedule: Schedule = "poly"
    """Shape of the rate over the run: poly, cosine, one_cycle (which rises by itself: no warm-up), or constant."""
    warmup_iterations: Annotated[int, Range(0)] = 0
    """Updates over which the rate rises linearly, from 1e-6 of what the decay gives."""
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Momentum, for sgd, momentum and others that have it under this name."""
    weight_decay: Annotated[float, Range(0)]
    """Decay of all weights but norms, biases, position tables, tokens and class embeddings."""
    max_grad_norm: Annotated[float | None, Range(0, above=True, infinite=True)] = None
    """Clip the norm of the gradient, or what clip_mode says; None does not."""
    clip_mode: ClipMode = "norm"
    """What max_grad_norm limits: norm, that of all gradients together; value, each number; agc, the gradient's norm
    over the weights', unit by unit."""
    skip_nonfinite: Annotated[int, Range(0)] = 0
    """So many steps of the run whose loss or gradient is not finite are left out, with a warning, and not its end; each
    step then waits for the device."""

    def rate_at(self, iteration: int, iterations: int, learning_rate: float | None = None) -> float:
        """The rate of the update that follows `iteration` updates of a run of `iterations`.

        Args:
            iteration: Number of updates made so far.
            iterations: Length of the run.
            learning_rate: The rate at the start of the decay; None means that of the field.

        Raises:
            ValueError: As `schedules.decayed` does, or if `one_cycle` has a warm-up.
        """
        if self.schedule == "one_cycle" and self.warmup_iterations:
            raise ValueError(
                f"warmup_iterations must be 0 with the schedule one_cycle, which rises by itself; "
                f"got {self.warmup_iterations}"
            )
        rate = decayed(
            self.schedule,
            iteration,
            iterations,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            min_learning_rate=self.min_learning_rate,
            power=self.power,
        )
        return _warmed(rate, iteration, self.warmup_iterations)

    def create(self, model: nn.Module, learning_rate: float | None = None) -> Optimizer:
        """The optimizer of a model that is on its device.

        Args:
            model: What `create_optimizer` takes.
            learning_rate: The rate at the start of the decay; None means that of the field.

        Raises:
            ValueError: As `create_optimizer` and `check_clipping` do.
        """
        check_clipping(self.clip_mode, self.max_grad_norm)
        return create_optimizer(
            model,
            self.optimizer,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            backbone_lr_scale=self.backbone_lr_scale,
            layer_decay=self.layer_decay,
        )


def poly_learning_rate(
    iteration: int,
    *,
    learning_rate: float,
    max_iterations: int,
    power: float = 0.9,
    min_learning_rate: float = 0.0,
    warmup_iterations: int = 0,
    warmup_ratio: float = 1e-6,
    warmup: Warmup = "linear",
) -> float:
    """The rate of the update that follows `iteration` updates: `(lr - min) (1 - t / T)^power + min`.

    Segmenter and MMSegmentation share the formula and differ in the warm-up. `"linear"` (MMSegmentation) scales the
    rate up from `warmup_ratio`. `"segmenter"` scales the decaying part up to its value at the end of the warm-up and,
    as published, makes the very first update at the full rate. A function of the iteration alone, so that a resumed
    run has nothing to restore.

    Args:
        iteration: Number t of updates made so far; from `max_iterations` on the rate stays.
        learning_rate: The rate at the start of the decay.
        max_iterations: Length T of the run.
        power: Exponent of the decay.
        min_learning_rate: The rate at the end of the decay.
        warmup_iterations: Length of the warm-up; 0 means none.
        warmup_ratio: Where a linear warm-up starts, as a fraction of the rate.
        warmup: The kind of warm-up.

    Raises:
        ValueError: If `iteration` is negative or `max_iterations` below 1.

    Examples:
        >>> poly_learning_rate(80_000, learning_rate=1e-3, max_iterations=160_000, min_learning_rate=1e-4)
        0.0005822...
    """
    rates = {"learning_rate": learning_rate, "min_learning_rate": min_learning_rate, "power": power}
    rate = decayed("poly", iteration, max_iterations, **rates)
    if warmup == "segmenter" and iteration < warmup_iterations:
        if iteration == 0:
            return learning_rate
        full = (1 - warmup_iterations / max_iterations) ** power
        return (learning_rate - min_learning_rate) * full * iteration / warmup_iterations + min_learning_rate
    return _warmed(rate, iteration, warmup_iterations, warmup_ratio)


def _warmed(rate: float, iteration: int, warmup_iterations: int, ratio: float = 1e-6) -> float:
    """The rate in a linear warm-up, from `ratio` of it."""
    return rate * (1 - (1 - iteration / warmup_iterations) * (1 - ratio)) if iteration < warmup_iterations else rate


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    backbone_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    fused: bool = True,
) -> Optimizer:
    """An optimizer by timm's name, with groups of parameters for what is not decayed and what learns more slowly.

    Not decayed are norms, biases and all other parameters of one axis, position tables, tokens and class embeddings:
    `NOT_DECAYED`, and what the model or a part of it names in timm's way, `no_weight_decay()`.

    SGD and AdamW use torch's fused kernels, one pass over each weight instead of one for each operation, and go on with
    them after a checkpoint of an optimizer that did not, or whose weights had another memory format. The model must be
    on its device.

    Args:
        model: Its parameters that require a gradient are optimised.
        name: As in `timm.optim.list_optimizers()`; note that timm's `"sgd"` is Nesterov (as Segmenter was trained) and
            `"momentum"` is not (as the MeanShifter was).
        learning_rate: The rate before any schedule.
        weight_decay: Decay of all other weights.
        momentum: Momentum, for those that have one under this name.
        backbone_lr_scale: Rate of `model.backbone` over that of the rest; kept in its groups as `lr_scale`, timm's
            word, which `set_learning_rate` heeds.
        layer_decay: Rate of each layer of `model.backbone` over that of the next, as timm groups them; the last
            layer's is this, times `backbone_lr_scale`, as in BEiT and MMSegmentation, and that of all else 1.
        fused: Use fused kernels where there are any: the names in `FUSED`, all parameters on a device in `FUSED_ON`.

    Raises:
        ValueError: If timm knows no such optimizer, or it cannot be used here, no parameter requires a gradient,
            `backbone_lr_scale` is negative or `layer_decay` out of range, one of them is not 1 and the model has no
            `backbone`, or `layer_decay` is not 1 and the backbone has one layer or learns nothing.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> optimizer = create_optimizer(model, "adamw", learning_rate=1e-4, weight_decay=0.01, momentum=0.9)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.0, 3), (0.01, 1)]
    """
    backbone = getattr(model, "backbone", None)
    if backbone_lr_scale < 0 or (backbone_lr_scale != 1 and backbone is None):
        raise ValueError(
            "backbone_lr_scale must be 0 or more, and 1 where the model has no backbone; "
            f"got {backbone_lr_scale} for a {type(model).__name__}"
        )
    check_optimizer(name)
    groups = _groups(model, weight_decay, backbone_lr_scale, _layer_scales(model, layer_decay))
    has_momentum = get_optimizer_info(_inner(name)).has_momentum
    options: dict[str, Any] = {"momentum": momentum} if has_momentum else {}
    fused = fused and name.lower() in FUSED and all(p.device.type in FUSED_ON for g in groups.values() for p in g)
    if fused:
        options["fused"] = True
    optimizer = create_optimizer_v2(
        [
            {"params": parameters, "weight_decay": decay, "lr": learning_rate * scale, "lr_scale": scale}
            for (decay, scale), parameters in sorted(groups.items())
        ],
        opt=name,
        lr=learning_rate,
        weight_decay=weight_decay,
        **options,
    )
    if fused:
        if isinstance(optimizer, torch.optim.SGD):
            # Where the first step overflows, the kernel leaves momentum that was never written: the scaler must skip it
            optimizer._step_supports_amp_scaling = False
        optimizer.register_load_state_dict_pre_hook(_stay_fused)
        optimizer.register_load_state_dict_post_hook(_lay_out_like_parameters)
    return optimizer


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that timm does not have, or that needs what is not here.

    Args:
        name: As in `timm.optim.list_optimizers()`.

    Raises:
        ValueError: If it is none, needs second derivatives, or a package and a GPU for kernels of its own.
    """
    inner, known = _inner(name), list_optimizers()
    if inner not in known:
        close: list[str] = difflib.get_close_matches(inner, map(str, known), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.optim.list_optimizers() shows all"
        raise ValueError(f"optimizer must be one of timm's {len(known)}, but is {name!r}; {hint}")
    if get_optimizer_info(inner).second_order:
        raise ValueError(f"optimizer {name} needs second derivatives, which are not computed; take adamw, say")
    needed = {"bnb": "bitsandbytes", "fused": "apex"}
    package = next((package for prefix, package in needed.items() if inner.startswith(prefix)), None)
    if package and not (torch.cuda.is_available() and find_spec(package)):
        raise ValueError(f"optimizer {name} needs a GPU and the package {package}; take adamw, say")


def _inner(name: str) -> str:
    return name.lower().removeprefix("lookahead_")


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """Of each parameter of the backbone, by its id, the rate over that of the backbone; empty where all have the same.

    timm's `param_groups_layer_decay` differs: without a classifier the last layer has the full rate.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, which decays nothing; got {layer_decay}")
    if layer_decay == 1:
        return {}
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, TimmBackbone):
        raise ValueError(f"layer_decay must be 1 where the model has no backbone; got {layer_decay}")
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    layers = backbone.layers()
    count = 1 + max(layers.values())
    if not parameters or count == 1:
        why = "has one layer" if parameters else "is frozen"
        raise ValueError(f"layer_decay must be 1 where {backbone.name} {why}; got {layer_decay}")
    return {id(p): layer_decay ** (count - layers[name]) for name, p in parameters.items()}


def _groups(
    model: nn.Module, weight_decay: float, scale: float, layer_scales: dict[int, float]
) -> dict[tuple[float, float], list[nn.Parameter]]:
    """Parameters that learn, by their decay and their rate over that of the rest."""
    backbone = getattr(model, "backbone", None)
    of_backbone = set() if backbone is None else {id(parameter) for parameter in backbone.parameters()}
    kept = _not_decayed(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = 0.0 if id(parameter) in kept else weight_decay
            own = scale * layer_scales.get(id(parameter), 1.0) if id(parameter) in of_backbone else 1.0
            groups.setdefault((decay, own), []).append(parameter)
    if not groups:
        raise ValueError(f"an optimizer needs parameters that require a gradient; {type(model).__name__} has none")
    return groups


def _stay_fused(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state brings its groups' options along, among them that they were not fused."""
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def _lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Fused kernels go through the memory of weight, gradient and state side by side; on the CPU none looks whether."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _not_decayed(model: nn.Module) -> set[int]:
    """Ids of the parameters that are not decayed.

    timm's `param_groups_weight_decay` differs: it asks the whole model alone for `no_weight_decay()`, not its parts,
    looks at one name of tied parameters, knows one rate, and reads patterns, of which XCiT has one (`pos_embed.*`).
    """
    names = set()
    for prefix, module in model.named_modules():
        listed: set[str] = getattr(module, "no_weight_decay", set)()
        names |= {f"{prefix}.{name}" if prefix else name for name in listed}
    return {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim <= 1 or name in names or name.rpartition(".")[2] in NOT_DECAYED
    }


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the rate of every group, times its `lr_scale` where timm gave it one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
