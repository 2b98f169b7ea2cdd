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
    torch.testing.assert_close(bilinear_weights(n_in, n_out, slice(n_out // 3, n_out)), expected[n_out // 3 :])


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (517, 129), (64, 128)])
@pytest.mark.parametrize("num_classes", [1, 150, 3000])
def test_tiles_cover_every_pixel_once(size, num_classes):
    times = torch.zeros(size)
    for tile in tiles(5, size[1], size, num_classes, torch.zeros(())):
        times[tile.rows.pixels, tile.columns.pixels] += 1
        assert tile.num_pixels == times[tile.rows.pixels, tile.columns.pixels].numel()
        assert tile.num_pixels <= max(bilinear.TILE_ELEMENTS / num_classes, 4 * bilinear.TILE_COLUMNS)
    assert (times == 1).all()


@pytest.mark.parametrize(("h", "w"), [(4, 9), (40, 9), (4, 150), (40, 150)])
@pytest.mark.parametrize("by_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_is_a_part_of_the_upsampled_logits(h, w, by_weights, dtype):
    logits = torch.randn(3, h, w).to(dtype)
    H, W = 40, 150
    expected = F.interpolate(logits[None].float(), size=(H, W), mode="bilinear", align_corners=False)[0]
    rows, columns = (bilinear_weights(h, H), bilinear_weights(w, W)) if by_weights else (h, w)
    for tile in tiles(rows, columns, (H, W), 3, logits):
        memory = torch.empty(3 * tile.num_pixels)
        scores = tile.upsample(logits, memory if by_weights else None).transpose(0, 1)  # (R, K, C) -> (K, R, C)
        torch.testing.assert_close(scores, expected[:, tile.rows.pixels, tile.columns.pixels], rtol=1e-5, atol=1e-5)


def test_a_tile_reads_its_part_of_the_grid_alone():
    for tile in tiles(32, 32, (512, 512), 150, torch.zeros(())):
        for block in tile:
            length = block.pixels.stop - block.pixels.start
            assert block.source.stop - block.source.start <= length / 16 + 3


def test_best_class_is_argmax():
    for K in (1, 2, 19, 256, 257, 1000):
        scores = torch.randn(3, K, 5)
        before = scores.clone()
        assert (best_class(scores) == scores.argmax(1)).all()
        assert torch.equal(scores, before)
        assert (best_class(scores, out=scores) == before.argmax(1)).all()
        half = before.bfloat16()  # which cannot hold the numbers of 1,000 classes
        assert (half.gather(1, best_class(half).long()[:, None])[:, 0] == half.amax(1)).all()
        assert (best_class(torch.zeros(3, K, 5)) == 0).all()  # all equal: the lowest
    assert best_class(torch.zeros(1, 256, 1)).dtype == torch.uint8
    assert best_class(torch.zeros(1, 257, 1)).dtype == torch.int16
