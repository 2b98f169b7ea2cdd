import pytest
import torch
import torch.nn.functional as F

from segheads.functional import bilinear
from segheads.functional.bilinear import bilinear_weights, tiles
from segheads.functional.upsample import best_class


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 9), (9, 1), (4, 4), (3, 8), (32, 512), (7, 5), (512, 31)])
def test_weights_are_those_of_interpolate(n_in, n_out):
    identity = torch.eye(n_in, dtype=torch.float64)[None]  # each grid point's share in every pixel
    expected = F.interpolate(identity, size=n_out, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(bilinear_weights(n_in, n_out), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (517, 129), (64, 128)])
@pytest.mark.parametrize("num_classes", [1, 150, 3000])
def test_tiles_cover_every_pixel_once(size, num_classes):
    times = torch.zeros(size)
    for tile in tiles(bilinear_weights(5, size[0]), None, size, num_classes, torch.zeros(())):
        times[tile.rows.pixels, tile.columns.pixels] += 1
        assert times[tile.rows.pixels, tile.columns.pixels].numel() <= max(bilinear.TILE_ELEMENTS / num_classes, 4 * 128)
    assert (times == 1).all()


@pytest.mark.parametrize(("h", "w"), [(4, 9), (40, 9), (4, 150), (40, 150)])
def test_a_tile_is_a_part_of_the_upsampled_logits(h, w):
    logits = torch.randn(3, h, w)
    H, W = 40, 150
    rows, columns = (None if n == N else bilinear_weights(n, N) for n, N in ((h, H), (w, W)))
    expected = F.interpolate(logits[None], size=(H, W), mode="bilinear", align_corners=False)[0]
    for tile in tiles(rows, columns, (H, W), 3, logits):
        scores = tile.upsample(logits).transpose(0, 1)  # (R, K, C) -> (K, R, C)
        torch.testing.assert_close(scores, expected[:, tile.rows.pixels, tile.columns.pixels], rtol=1e-5, atol=1e-5)


def test_a_tile_reads_its_part_of_the_grid_alone():
    for tile in tiles(bilinear_weights(32, 512), bilinear_weights(32, 512), (512, 512), 150, torch.zeros(())):
        for block in tile:
            length = block.pixels.stop - block.pixels.start
            assert block.source.stop - block.source.start <= length / 16 + 3


def test_best_class_is_argmax():
    for K in (1, 2, 19, 256, 257, 1000):
        scores = torch.randn(3, K, 5)
        assert (best_class(scores) == scores.argmax(1)).all()
        assert (best_class(torch.zeros(3, K, 5)) == 0).all()  # all equal: the lowest
    assert best_class(torch.zeros(1, 256, 1)).dtype == torch.uint8
    assert best_class(torch.zeros(1, 257, 1)).dtype == torch.int16
