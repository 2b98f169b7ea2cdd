"""Attention weights of any module, read where it calls PyTorch's attention; everything is as it was afterwards."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segheads.modules import evaluating


class AttentionCall(NamedTuple):
    """One call of `scaled_dot_product_attention`, from which its weights can be computed, all or some rows.

    Attributes:
        inside: Names of the modules that were running, the outermost first; the last one attends.
        query: `(B, heads, N, d)`.
        key: `(B, heads, M, d)`.
        value: `(B, heads, M, d_v)`.
        bias: What is added to the scores, such as relative positions, or None; broadcasts to `(B, heads, N, M)`.
        scale: What scalar products are multiplied with.
    """

    inside: tuple[str, ...]
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float

    def weights(self, rows: slice = slice(None)) -> Tensor:
        """Attention weights of some queries, before any dropout, in float32.

        Args:
            rows: Which of the N queries.

        Shape:
            `(B, heads, rows, M)`; every row sums to 1.
        """
        with torch.autocast(self.query.device.type, enabled=False):
            scores = self.query[..., rows, :].float() @ self.key.float().mT * self.scale
        if self.bias is not None:
            N, M = self.query.shape[-2], self.key.shape[-2]
            scores = scores + self.bias.expand(*self.bias.shape[:-2], N, M)[..., rows, :].float()
        return scores.softmax(-1)

    def with_batch(self, B: int) -> "AttentionCall":
        """The same call with an axis for the batch where heads and batch are one axis, `(B * heads, N, d)`.

        Args:
            B: Size of the batch.
        """
        query, key, value = (x.unflatten(0, (B, -1)) for x in (self.query, self.key, self.value))
        bias = self.bias
        if bias is not None and bias.ndim == 3 and len(bias) > 1:
            bias = bias.unflatten(0, (B, -1))
        return self._replace(query=query, key=key, value=value, bias=bias)


@contextmanager
def attention_calls(model: nn.Module, visit: Callable[[AttentionCall], None]) -> Iterator[None]:
    """While the context lasts, `visit` sees every attention that the model's modules compute.

    The calls of `torch.nn.functional.scaled_dot_product_attention` are seen on their way to PyTorch, so that the fused
    kernels still do the work, no module is replaced, and every architecture that calls it is covered: 25 of timm's
    model files, and the heads here. timm's modules that were told not to (`fused_attn`) are told to for as long as the
    context lasts. The model is in evaluation mode and not compiled meanwhile; afterwards every module's mode, flag and
    hooks are as they were, also after an error.

    Args:
        model: Any module.
        visit: Called once for each call of attention; queries and keys are freed after it, unless it keeps them.

    Examples:
        >>> from timm.layers import Attention
        >>> shapes = []
        >>> attention = Attention(8, num_heads=2)
        >>> with attention_calls(attention, lambda call: shapes.append(call.weights().shape)):
        ...     _ = attention(torch.randn(1, 5, 8))
        >>> shapes
        [torch.Size([1, 2, 5, 5])]
    """
    running: list[str] = []

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as restore:
        restore.enter_context(evaluating(model))
        restore.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if getattr(module, "fused_attn", True) is False:
                module.fused_attn = True
                restore.callback(setattr, module, "fused_attn", False)
            enter = _Enter(running, name)
            restore.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            restore.callback(module.register_forward_hook(leave, always_call=True).remove)
        restore.enter_context(_Watch(running, visit))
        yield


class _Enter:
    """A forward pre-hook that notes which module runs."""

    def __init__(self, running: list[str], name: str) -> None:
        self.running, self.name = running, name

    def __call__(self, *_: Any) -> None:
        self.running.append(self.name)


class _Watch(TorchFunctionMode):
    """Shows calls of attention to a visitor and passes them on."""

    def __init__(self, running: list[str], visit: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self.running, self.visit = running, visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.running:
            self.visit(_call(tuple(self.running), *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _call(
    inside: tuple[str, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 (none of the weights' business)
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The arguments of PyTorch's function, which may be given by place."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, -torch.inf)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return AttentionCall(inside, query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)
