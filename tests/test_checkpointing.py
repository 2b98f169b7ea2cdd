"""Gradient checkpointing: the same update with less kept, and a refusal where nothing would be saved."""

import pytest
import torch

from segheads import create_model
from segheads.checkpointing import start_grad_checkpointing

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(2, 64, 64, dtype=torch.long)


def model_of(backbone, **options):
    torch.manual_seed(0)
    kwargs = {"drop_path_rate": 0.2} if backbone != "vgg11" else {}
    return create_model(backbone, "linear", 3, pretrained=False, backbone_kwargs=kwargs, **options).train()


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("test_vit", {}), ("test_resnet", {}), ("test_convnext", {}), ("test_resnet", {"freeze_stages": 2})],
)
def test_gradients_and_statistics_are_those_without_and_less_is_kept(backbone, options):
    found = []
    for checkpoints in (False, True):
        model, kept = model_of(backbone, **options), []
        if checkpoints:
            start_grad_checkpointing(model.backbone)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(IMAGES, LABELS)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        statistics = {name: x for name, x in model.named_buffers() if "running" in name}
        found.append((gradients, statistics, sum(kept)))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][2] < 0.8 * found[0][2]


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("vgg11", {}, "^grad_checkpointing needs an architecture that has it; timm's vgg11 has none$"),
        ("test_vit", {"freeze_backbone": True}, "^grad_checkpointing saves nothing where test_vit is frozen"),
    ],
)
def test_what_would_save_nothing_is_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        start_grad_checkpointing(model_of(backbone, **options).backbone)
