"""Segmenter's mask transformer."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segheads.classes import num_labels
from segheads.functional.binary import without_background
from segheads.heads.base import Head


class MaskTransformerHead(Head):
    """Class embeddings and patch tokens go through a small transformer; their scalar products are the masks.

    Segmenter (Strudel et al., ICCV 2021, https://arxiv.org/abs/2105.05633; https://github.com/rstrudel/segmenter).
    K learned class embeddings are appended to the projected patch tokens, pre-norm transformer blocks let all attend
    to all, and the mask of a class is the scalar product of its normalised token with each normalised patch token.

    As in the published code, and unlike the paper's equation, there is no softmax before the LayerNorm over classes.
    The LayerNorm of a single mask would be constant: with `num_classes=1` the background has an embedding of its own,
    and the logit is the difference of both masks.

    L2 norms have an eps of 1e-12 (MMSegmentation), where the official code has none.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.
        embed_dim: Width D of the transformer; None means `in_channels`.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads; None means `embed_dim // 64`, or the next smaller number that divides embed_dim.
        mlp_ratio: Hidden width of the MLPs over `embed_dim`.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        drop_rate: Dropout after attention and in the MLPs.

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`, `num_layers` is below 1, or the map has other than
            `in_channels` channels.

    Examples:
        >>> MaskTransformerHead(192, 150)(torch.randn(2, 192, 16, 24)).shape
        torch.Size([2, 150, 16, 24])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        embed_dim: int | None = None,
        num_layers: int = 2,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_channels, num_classes)
        D = in_channels if embed_dim is None else embed_dim
        heads = default_num_heads(D) if num_heads is None else num_heads
        if heads < 1 or D % heads:
            raise ValueError(f"num_heads must divide embed_dim {D}; got {heads}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more; got {num_layers}")
        self.project = nn.Linear(in_channels, D)
        masks = num_labels(num_classes)
        self.class_embeddings = nn.Parameter(torch.zeros(1, masks, D))
        rates = torch.linspace(0, drop_path_rate, num_layers).tolist()
        self.blocks = nn.Sequential(*(_block(D, heads, mlp_ratio, drop_rate, rate) for rate in rates))
        self.norm = nn.LayerNorm(D)
        self.project_patches = nn.Linear(D, D, bias=False)
        self.project_classes = nn.Linear(D, D, bias=False)
        self.mask_norm = nn.LayerNorm(masks)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.class_embeddings, std=0.02)
        for projection in (self.project_patches, self.project_classes):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        B, _, h, w = x.shape
        patches = self.project(x.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, D)
        classes = self.class_embeddings.expand(B, -1, -1).to(patches.dtype)
        tokens = self.norm(self.blocks(torch.cat([patches, classes], dim=1)))  # (B, N + K, D)
        patches, classes = tokens.split([h * w, classes.shape[1]], dim=1)
        patches = F.normalize(self.project_patches(patches), dim=-1)
        classes = F.normalize(self.project_classes(classes), dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))  # (B, N, K)
        logits = masks.transpose(1, 2).reshape(B, -1, h, w)
        return without_background(logits) if self.num_classes == 1 else logits


def default_num_heads(embed_dim: int) -> int:
    """`embed_dim // 64` as published, or the next smaller number that divides `embed_dim`."""
    return next(heads for heads in range(max(1, embed_dim // 64), 0, -1) if embed_dim % heads == 0)


def _block(embed_dim: int, num_heads: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float) -> Block:
    return Block(
        embed_dim,
        num_heads,
        mlp_ratio,
        qkv_bias=True,
        proj_drop=drop_rate,
        drop_path=drop_path_rate,
        norm_layer=nn.LayerNorm,  # eps 1e-5 in the published heads; timm's own norm has 1e-6
    )
