"""Losses in words: one by name, or a sum of several."""

import ast
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segheads.functional.upsample import Reduction
from segheads.losses.base import PixelLoss
from segheads.losses.registry import LOSSES, build_loss, find_loss, own_options


class Term(NamedTuple):
    """A term of a loss in words: `0.5*dice(stride=2)`."""

    factor: float
    name: str
    options: dict[str, Any]


class LossSum(PixelLoss):
    """Several losses of the same logits, each times its factor, summed: `create_loss("ce + 0.5*dice", 19)`.

    Args:
        terms: Factor and loss of each term.
        names: What each is called in a log; None means the names of their classes.
    """

    may_be_binary = True

    def __init__(self, terms: Sequence[tuple[float, PixelLoss]], names: Sequence[str] | None = None) -> None:
        nn.Module.__init__(self)  # the rest is the terms'
        self.num_classes = terms[0][1].num_classes
        self.factors = [factor for factor, _ in terms]
        self.terms = nn.ModuleList(loss for _, loss in terms)
        self._names = _numbered([type(loss).__name__ for _, loss in terms] if names is None else names)

    @property
    def ignore_index(self) -> int:
        """The label that all terms leave out."""
        return self._pairs()[0][1].ignore_index

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        for _, loss in self._pairs():
            loss.ignore_index = value

    @property
    def reduction(self) -> Reduction:
        """What sums over pixels are divided by, in all terms."""
        return self._pairs()[0][1].reduction

    @reduction.setter
    def reduction(self, value: Reduction) -> None:
        for _, loss in self._pairs():
            loss.reduction = value

    def compute_terms(self, logits: Tensor, labels: Tensor, pixels: int) -> list[Tensor]:
        """What each loss computes."""
        return [loss.compute(logits, labels, pixels) for _, loss in self._pairs()]

    def joined(self, terms: Sequence[Tensor], shares: Tensor | None = None) -> Tensor:
        """The terms times their factors and shares, summed."""
        parts = [factor * term for factor, term in zip(self.factors, terms, strict=True)]
        summed: Tensor = sum(parts[1:], parts[0]) if shares is None else (torch.stack(parts) * shares).sum()
        return summed

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The sum of the terms."""
        return self.joined(self.compute_terms(logits, labels, pixels))

    @property
    def term_names(self) -> list[str]:
        """Those in the sum, numbered where one stands twice."""
        return list(self._names)

    def divisors(self, labels: Tensor) -> Tensor:
        """Those of each term, `(T,)`."""
        return torch.cat([loss.divisors(labels) for _, loss in self._pairs()])

    @property
    def divides_by(self) -> str:
        """What the divisors of each term count, in words."""
        pairs = zip(self.term_names, self._pairs(), strict=True)
        return ", ".join(f"{loss.divides_by} ({name})" for name, (_, loss) in pairs)

    def _pairs(self) -> list[tuple[float, PixelLoss]]:
        return list(zip(self.factors, self.terms, strict=True))  # type: ignore[arg-type]  # a ModuleList of losses

    def extra_repr(self) -> str:
        """Adds the factors to the module's representation."""
        return f"factors={self.factors}"


def create_loss(
    loss: str | Callable[..., PixelLoss],
    num_classes: int,
    *,
    ignore_index: int = 255,
    reduction: Reduction = "valid",
    **options: Any,
) -> PixelLoss:
    """Build a loss, or a sum of several.

    Args:
        loss: A name in `LOSSES`, a sum of them such as `"ce + 0.5*dice"`, where each may have options of its own, as
            in `"ohem(keep=0.1) + dice(stride=2)"`; or what builds a loss from the arguments below.
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: See `PixelLoss`.
        **options: The loss's own; in a sum, of each term that has such an option and does not say it itself.

    Raises:
        ValueError: If no loss has that name (the message lists the known ones), it has no such option, or refuses a
            value; or the sum is no such text.

    Examples:
        >>> create_loss("ce", 19, label_smoothing=0.1)
        CrossEntropy(ignore_index=255, reduction=valid, weight=None, label_smoothing=0.1)
        >>> create_loss("ce + 0.5*dice", 19).factors
        [1.0, 0.5]
    """
    common: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    if not isinstance(loss, str):
        return build_loss(loss, num_classes, common, options)
    terms = parse_loss(loss)
    if len(terms) == 1 and terms[0].factor == 1:
        return build_loss(terms[0].name, num_classes, common, {**options, **terms[0].options})
    known = [own_options(find_loss(term.name)) for term in terms]
    if strange := [name for name in options if all(own is not None and name not in own for own in known)]:
        raise ValueError(f"no term of loss {loss!r} takes {', '.join(strange)}")
    built = []
    for term, own in zip(terms, known, strict=True):
        given = {name: value for name, value in options.items() if own is None or name in own}
        if num_classes == 1 and getattr(find_loss(term.name), "may_be_binary", False):
            given.pop("weight", None)  # smp has none there
        built.append((term.factor, build_loss(term.name, num_classes, common, {**given, **term.options})))
    return LossSum(built, [term.name for term in terms])


def parse_loss(text: str) -> list[Term]:
    """The terms of a loss in words.

    Args:
        text: Names in `LOSSES`, with factors and options: `"ce + 0.5*dice(stride=2)"`.

    Raises:
        ValueError: If it is no such text, a factor is not above 0, or no loss has a name.

    Examples:
        >>> parse_loss("ce + 0.5*dice(stride=2)")
        [Term(factor=1.0, name='ce', options={}), Term(factor=0.5, name='dice', options={'stride': 2})]
    """
    if text in LOSSES:  # a name of your own may be no word of Python
        return [Term(1.0, text, {})]
    try:
        terms = [_term(part) for part in _summands(ast.parse(text.strip(), mode="eval").body)]
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'loss must be a name, or a sum such as "ce + 0.5*dice" or "ohem(keep=0.1) + dice"; got {text!r}'
        ) from error
    for term in terms:
        find_loss(term.name)
        if not 0 < term.factor < float("inf"):
            raise ValueError(f"the factor of {term.name} in loss {text!r} must be above 0; got {term.factor:g}")
    return terms


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _term(node: ast.expr) -> Term:
    """A summand; a TypeError where it is none."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factor, node = node.left, node.right
        if not isinstance(factor, ast.Constant) or not isinstance(factor.value, (int, float)):
            raise TypeError(ast.unparse(factor))
        return _term(node)._replace(factor=float(factor.value))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        options = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
        if len(options) == len(node.keywords):
            return Term(1.0, node.func.id, options)
    if isinstance(node, ast.Name):
        return Term(1.0, node.id, {})
    raise TypeError(ast.unparse(node))


def _numbered(names: Sequence[str]) -> list[str]:
    """Names of which none stands twice: dice, dice_2."""
    before = [list(names[:place]).count(name) for place, name in enumerate(names)]
    return [name if count == 0 else f"{name}_{count + 1}" for name, count in zip(names, before, strict=True)]


def is_binary(loss: str | Callable[..., PixelLoss]) -> bool:
    """Whether a loss is of one class, with which a model gives one logit for each pixel.

    Args:
        loss: What `create_loss` takes; of a sum one such term is enough.

    Raises:
        ValueError: If no loss has that name; the message lists the known ones.

    Examples:
        >>> is_binary("bce + dice"), is_binary("ce")
        (True, False)
    """
    built = [find_loss(term.name) for term in parse_loss(loss)] if isinstance(loss, str) else [loss]
    return any(getattr(one, "is_binary", False) for one in built)
