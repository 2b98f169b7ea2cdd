"""Feature fusion against its parts written out."""

import torch
import torch.nn.functional as F
from testers import randomised

from segheads import FeatureFusionHead


def test_fused_features_are_normed_and_rectified():
    """Convolution, batch norm and ReLU before the decoder, as in SenFormer's Fig. 3."""
    head = randomised(FeatureFusionHead([8, 8], 5, decoder_kwargs={"num_layers": 1, "num_heads": 2})).eval()
    fine, coarse = torch.randn(2, 8, 6, 4), torch.randn(2, 8, 3, 2)
    levels = torch.cat([fine, F.interpolate(coarse, (6, 4), mode="bilinear")], dim=1)
    norm = head.norm[0]
    fused = F.batch_norm(
        F.conv2d(levels, head.fuse.weight, padding=1), norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    torch.testing.assert_close(head([fine, coarse]), head.decoder(fused.relu()))
