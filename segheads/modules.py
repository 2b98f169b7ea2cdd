"""What any module may need done to it: evaluation for a while, freezing of what nothing depends on."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(*models: nn.Module, grad: bool = False) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had, not all the same one.

    Parts that a user keeps in evaluation mode, such as frozen batch norms, so stay in it.

    Args:
        *models: Any modules.
        grad: Leave gradients on; by default there are none.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
        >>> with evaluating(model):
        ...     print(model.training, model[1].training)
        False False
        >>> model.training, model[0].training, model[1].training
        (True, False, True)
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def start_training(model: nn.Module) -> None:
    """Training mode of a model that is in evaluation mode; one that is not keeps what it has, part by part.

    Args:
        model: The model itself, not what Accelerate made of it.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
        >>> start_training(model)
        >>> model[0].training, model[1].training
        (False, True)
    """
    if not model.training:
        model.train()


def weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    """What a linear layer multiplies with and adds, where a function takes them in place of the layer.

    Args:
        linear: An `nn.Linear`, or what `torch.ao.quantization` put in its place, whose int8 weights become floats.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight, linear.bias
    return linear.weight().dequantize(), linear.bias()


def parameters_behind(maps: Sequence[Tensor]) -> set[int]:
    """Ids of the parameters that the maps depend on; reading the graph, as DDP does, spares a backward pass.

    Args:
        maps: Tensors that were computed with gradients on.
    """
    needed: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn for x in maps]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            needed.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return needed


def modules_before_learning(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """Names of the modules that run before anything that learns: no gradient flows into them or through them.

    Args:
        model: Any module, of which some parameters require no gradient; every part keeps its mode.
        run: One run of the model, which is in evaluation mode meanwhile.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
        >>> _ = model[0].requires_grad_(False)
        >>> sorted(modules_before_learning(model, lambda: model(torch.zeros(1, 2))))
        ['0', '1']
    """
    learns: dict[str, bool] = {}  # of those that were called
    handles = []
    for name, module in model.named_modules():

        def look(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            learns[name] = learns.get(name, False) or _requires_grad(output)

        handles.append(module.register_forward_hook(look))
    try:
        with evaluating(model, grad=True):
            run()
    finally:
        for handle in handles:
            handle.remove()
    still = {name for name, learning in learns.items() if not learning}
    found = set()
    for name, _ in model.named_modules():
        inside = [learning for other, learning in learns.items() if not name or f"{other}.".startswith(f"{name}.")]
        called = bool(inside) and not any(inside)  # or all that is called inside it
        if called or any(name.startswith(f"{part}.") for part in still):
            found.add(name)
    return found


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_requires_grad, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_requires_grad, value))


def freeze_unused(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Freeze the parameters that no output depends on, such as a pyramid's outputs without a learner: DDP stops there.

    Args:
        model: Any module; every part keeps its mode.
        run: Gives the outputs of one run of the model, which is in evaluation mode meanwhile.

    Returns:
        The outputs of that run.
    """
    with evaluating(model, grad=True):
        outputs = list(run())
    needed = parameters_behind(outputs)
    for parameter in model.parameters():
        if id(parameter) not in needed:
            parameter.requires_grad_(False)
    return outputs


def weights_hash(module: nn.Module, start: bytes = b"") -> str:
    """A SHA-256 of the names, types, shapes and values of all weights and buffers.

    Args:
        module: Any module.
        start: What else it is to depend on.
    """
    digest = hashlib.sha256(start)
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
