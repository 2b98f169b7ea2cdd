"""SenFormer's learner: class embeddings that query one feature map."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from segheads.heads.base import Head


class ClassAttentionHead(Head):
    """Class embeddings query one map through a small transformer decoder, and score its positions.

    The learner of SenFormer (Bousselham et al., BMVC 2022, https://arxiv.org/abs/2111.13280;
    https://github.com/WalBouss/SenFormer). K class embeddings go through blocks of cross-attention to the normalised
    map, self-attention and an MLP; a class's score at a position is the plain scalar product of the two.

    The paper repeats one block `num_layers` times (`shared_block=True`, the default); its published code builds
    separate blocks. Keys and values of a shared block are the same in every repetition, so they are computed once.
    As published, class embeddings start at zero, and attention's scale is that of one attention head's width.

    Args:
        in_channels: Channels of the feature map, also the width D of the transformer.
        num_classes: Number of classes K.
        num_layers: How often the block is applied, or how many blocks there are. With a shared block it may be changed
            on a trained head.
        num_heads: Attention heads; None means the published 8, or the next smaller number that divides `in_channels`.
        shared_block: One block for all layers, or a block for each.
        mlp_ratio: Hidden width of the MLP over `in_channels`.
        pre_norm: LayerNorm before each part, as published, or after its residual sum (the paper's comparison).
        drop_path_rate: Stochastic depth of every part of a block.

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If `num_heads` does not divide `in_channels`, `num_layers` is below 1 or is changed although the
            blocks are separate, or the map has other than `in_channels` channels.

    Examples:
        >>> ClassAttentionHead(256, 150)(torch.randn(2, 256, 16, 24)).shape
        torch.Size([2, 150, 16, 24])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_layers: int = 6,
        num_heads: int | None = None,
        shared_block: bool = True,
        mlp_ratio: float = 4.0,
        pre_norm: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_channels, num_classes)
        D = self.in_channels
        heads = next(n for n in range(8, 0, -1) if D % n == 0) if num_heads is None else num_heads
        if heads < 1 or D % heads:
            raise ValueError(f"num_heads must divide in_channels {D}; got {heads}")
        self.shared_block = shared_block
        self._num_layers = _at_least_one(num_layers)
        self.class_embeddings = nn.Parameter(torch.zeros(1, num_classes, D))
        self.norm_features = nn.LayerNorm(D)
        count = 1 if shared_block else num_layers
        self.blocks = nn.ModuleList(_Block(D, heads, mlp_ratio, pre_norm, drop_path_rate) for _ in range(count))
        self.norm = nn.LayerNorm(D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def num_layers(self) -> int:
        """How often a block is applied."""
        return self._num_layers

    @num_layers.setter
    def num_layers(self, num_layers: int) -> None:
        if not self.shared_block and num_layers != self._num_layers:
            raise ValueError(f"num_layers of separate blocks is fixed at {self._num_layers}; got {num_layers}")
        self._num_layers = _at_least_one(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        B, _, h, w = x.shape
        features = self.norm_features(x.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, D)
        classes = self.class_embeddings.expand(B, -1, -1).to(features.dtype)
        blocks: Any = self.blocks
        for layer in range(self._num_layers):
            block = blocks[0 if self.shared_block else layer]
            if layer == 0 or not self.shared_block:  # a repeated block would compute the same again
                memory = block.cross_attention.read(features)
            classes = block(classes, memory)
        scores = self.norm(classes) @ features.transpose(1, 2)  # (B, K, N)
        return scores.reshape(B, self.num_classes, h, w)

    def settings(self) -> dict[str, int]:
        """`num_layers`, which may be changed on a trained head with a shared block."""
        return {"num_layers": self._num_layers}


class _Block(nn.Module):
    """Cross-attention to the features, self-attention among the classes, MLP; each with a residual."""

    def __init__(self, D: int, num_heads: int, mlp_ratio: float, pre_norm: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.cross_attention = _CrossAttention(D, num_heads)
        self.self_attention = Attention(D, num_heads, qkv_bias=True)
        self.mlp = Mlp(D, int(mlp_ratio * D))  # exact GELU
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, classes: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        if self.pre_norm:
            classes = classes + self.drop_path(self.cross_attention(self.norm1(classes), memory))
            classes = classes + self.drop_path(self.self_attention(self.norm2(classes)))
            return classes + self.drop_path(self.mlp(self.norm3(classes)))
        classes = self.norm1(classes + self.drop_path(self.cross_attention(classes, memory)))
        classes = self.norm2(classes + self.drop_path(self.self_attention(classes)))
        return self.norm3(classes + self.drop_path(self.mlp(classes)))


class _CrossAttention(nn.Module):
    """Multi-head attention whose keys and values are computed apart, so that repetitions can share them."""

    def __init__(self, D: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the features, each `(B, heads, N, D / heads)`."""
        key, value = self.kv(features).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, classes: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        read = F.scaled_dot_product_attention(self._split(self.q(classes)), *memory)
        return self.proj(read.transpose(1, 2).flatten(2))  # (B, heads, K, D / heads) -> (B, K, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D / heads)


def _at_least_one(num_layers: int) -> int:
    if num_layers < 1:
        raise ValueError(f"num_layers must be 1 or more; got {num_layers}")
    return num_layers
