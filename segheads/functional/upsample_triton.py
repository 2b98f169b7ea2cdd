"""Loss, gradient and label map of bilinearly upsampled logits as Triton kernels that never store the upsampled ones.

Every score of a full-resolution pixel is made from its four corners where it is needed, and forgotten. Nothing is added
atomically: two runs give the same bits. Without Triton (macOS, say) the module imports, and `obstacle` says so.

Tested in Triton's interpreter and on an H100, compiled for compute capability 7.5 to 12.0. The block sizes follow from
counting registers and instructions; others have not been measured.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Walks over the classes: a thread has one column of up to 8 rows between the same two rows of the grid, so that it
# reads four corners, and blends them along x, once for all of them.
_ROWS, _COLUMNS = 8, 64
_STRIP = {"num_warps": 2, "enable_fp_fusion": True}
# Gradient: lanes of one warp hold classes, registers up to 16 pixels in up to 8 columns (96 registers on Hopper).
_PIXELS, _ACROSS, _CLASSES = 16, 8, 32
_CELL = {"num_warps": 1, "enable_fp_fusion": True}
_PROGRAMS = 8192  # enough to fill a large GPU; with fewer cells, classes are spread over programs, too


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot serve logits of a type on a device, in words; empty where nothing is known to be wrong.

    They serve fp32 and fp16 on NVIDIA GPUs from compute capability 7.0 on, bf16 from 8.0 on, and all three anywhere in
    Triton's interpreter. Whether Triton can build them is for `segheads.functional.paths` to find out.

    Args:
        device: Where the logits are.
        dtype: Their type.
    """
    if triton is None:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    if is_interpreted():
        return ""
    if device.type != "cuda" or torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs"
    found, needed = torch.cuda.get_device_capability(device), (8, 0) if dtype == torch.bfloat16 else (7, 0)
    return "" if found >= needed else f"compute capability {found[0]}.{found[1]} is below {needed[0]}.{needed[1]}"


def is_interpreted() -> bool:
    """Whether Triton interprets the kernels, on any device; it decides that when it is imported."""
    return triton is not None and not isinstance(_loss_kernel, triton.JITFunction)


def version() -> str | None:
    """Triton's; None without it."""
    return None if triton is None else str(triton.__version__)


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum over pixels of `b_y (lse - u_y) + sum_k s_k (lse - u_k)`, and its gradient with respect to the logits.

    `u` are the upsampled scores of a pixel of class y, `lse` the logarithm of the sum of their exponentials. A first
    kernel writes `lse`, the only map of full resolution; a second one goes through the cells between neighbouring
    points of the low-resolution grid, sums over the pixels of each, and adds to its four corners. It is launched four
    times, for cells of even and odd rows and columns, so that no two running at once have a corner in common.

    A label that is neither a class nor `ignore_index` makes the sum NaN, and the gradient at its pixel's corners: an
    error would have to wait for the GPU.

    Args:
        logits: Class scores on the head's grid: fp32, fp16 or bf16; computed with in fp32.
        labels: Class of each pixel, or `ignore_index`; any integer type.
        label_weights: b; None means ones.
        smoothing_weights: s; None means zeros.
        ignore_index: The label that is left out.
        needs_gradient: Whether to compute the gradient; if not, it is None.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)`, weights `(K,)`; a scalar, and `(B, K, h, w)`, both fp32.
    """
    (B, K, h, w), (H, W) = logits.shape, labels.shape[1:]
    sizes, index = (K, h, w, H, W), _index_type(h, w, H, W)
    programs, strip = _strips(B, h, H, W)
    labels, planes = labels.contiguous(), logits.contiguous()
    b, s = (None if weights is None else weights.float().contiguous() for weights in (label_weights, smoothing_weights))
    everywhere = None if s is None else s.sum()
    lse = planes.new_empty(labels.shape, dtype=torch.float32) if needs_gradient else None
    parts = planes.new_zeros(programs, dtype=torch.float32)
    if programs == 0:
        return parts.sum(), planes.new_zeros(planes.shape, dtype=torch.float32) if needs_gradient else None
    with torch.cuda.device_of(planes):
        _loss_kernel[(programs,)](
            planes, labels, b, s, everywhere, parts, lse, *sizes, ignore_index, index, *strip, **_STRIP
        )
        if not needs_gradient:
            return parts.sum(), None
        gradient = planes.new_zeros((B, h, w, K), dtype=torch.float32)
        points = planes.permute(0, 2, 3, 1).contiguous()  # (B, K, h, w) -> (B, h, w, K)
        columns = min(_ACROSS, triton.next_power_of_2(triton.cdiv(W, w)))
        rows = min(_PIXELS // columns, triton.next_power_of_2(triton.cdiv(H, h)))
        classes = min(_CLASSES, triton.next_power_of_2(K))
        for odd_y, odd_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            cells = B * ((h + 2 - odd_y) // 2) * ((w + 2 - odd_x) // 2)
            share = classes * triton.cdiv(triton.cdiv(K, classes), triton.cdiv(_PROGRAMS, cells))
            _gradient_kernel[(cells * triton.cdiv(K, share),)](
                points, labels, lse, b, s, everywhere, gradient, *sizes, odd_y, odd_x, share,
                index, rows, columns, classes, **_CELL,
            )  # fmt: skip
    return parts.sum(), gradient.permute(0, 3, 1, 2).contiguous()  # (B, h, w, K) -> (B, K, h, w)


def label_map(
    logits: Tensor, size: tuple[int, int], dtype: torch.dtype, *, return_probability: bool
) -> tuple[Tensor, Tensor | None]:
    """The class of the highest score of each pixel of logits upsampled to `size`, and its probability.

    Of classes with equal scores the lowest wins; NaN never does.

    Args:
        logits: Class scores on the head's grid: fp32, fp16 or bf16; computed with in fp32.
        size: Height and width of the label map, pixels.
        dtype: Integer type of the label map.
        return_probability: Whether to compute the softmax's value of the winner, too; if not, it is None.

    Shape:
        `(B, K, h, w)` to `(B, *size)`, twice; the probability is fp32.
    """
    (B, K, h, w), (H, W) = logits.shape, size
    planes = logits.contiguous()
    labels = planes.new_empty((B, H, W), dtype=dtype)
    probability = planes.new_empty((B, H, W), dtype=torch.float32) if return_probability else None
    programs, strip = _strips(B, h, H, W)
    if programs:
        with torch.cuda.device_of(planes):
            _label_kernel[(programs,)](
                planes, labels, probability, K, h, w, H, W, _index_type(h, w, H, W), *strip, **_STRIP
            )
    return labels, probability


def _strips(B: int, h: int, H: int, W: int) -> tuple[int, tuple[int, int]]:
    """The number of strips of pixels that `_strip` cuts images into, and their rows and columns at most."""
    rows = min(_ROWS, triton.next_power_of_2(triton.cdiv(H, h)))
    columns = min(_COLUMNS, triton.next_power_of_2(W))
    return B * (h + 1) * triton.cdiv(triton.cdiv(H, h), rows) * triton.cdiv(W, columns), (rows, columns)


def _index_type(h: int, w: int, H: int, W: int) -> Any:
    """The integer type that holds the products of `_source` and `_first_pixel`."""
    return tl.int32 if 2 * max((h + 1) * (H + 1), (w + 1) * (W + 1)) < 2**31 else tl.int64


# No kernel is compiled anew for other sizes: the images of a data set come in many.
_SIZES = ["K", "h", "w", "H", "W", "ignore_index", "odd_y", "odd_x", "share"]

if triton is not None:

    @triton.jit
    @no_type_check
    def _source(pixel, n_in, n_out):
        """The point of the grid that a pixel falls on, in units of 1 / (2 n_out): an integer, so corners are exact."""
        return (2 * pixel + 1) * n_in - n_out

    @triton.jit
    @no_type_check
    def _first_pixel(cell, n_in, n_out):
        """The first pixel whose lower corner is `cell` or beyond; cell -1 holds the pixels before the first point."""
        source = tl.maximum((2 * cell + 1) * n_out + n_in - 1, 0)
        return tl.minimum(source // (2 * n_in), n_out).to(tl.int32)

    @triton.jit
    @no_type_check
    def _strip(h, w, H, W, INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Pixels of one program: columns of a few rows that share their corners' rows.

        Returns the number of the image, the pixels' offsets in it, whether they exist, whether any does, the offsets
        of their corners, and how far along the way from corner to corner they are.
        """
        program = tl.program_id(0)
        tiles = tl.cdiv(W, COLUMNS)
        strips = tl.cdiv(tl.cdiv(H, h), ROWS)
        column = (program % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        program = program // tiles
        cell = (program // strips % (h + 1) - 1).to(INDEX)
        image = (program // strips // (h + 1)).to(tl.int64)
        first = _first_pixel(cell, h, H) + program % strips * ROWS
        bottom = _first_pixel(cell + 1, h, H)
        row = (first + tl.arange(0, ROWS))[:, None]
        inside = (row < bottom) & (column < W)
        source = tl.maximum(_source(tl.minimum(column, W - 1).to(INDEX), w, W), 0)
        x = source // (2 * W)
        fx = (source - x * (2 * W)).to(tl.float32) / (2 * W)
        fy = (_source(row.to(INDEX), h, H) - cell * (2 * H)).to(tl.float32) / (2 * H)
        x = x.to(tl.int32)
        next_x = tl.minimum(x + 1, w - 1)
        upper = tl.maximum(cell, 0).to(tl.int32) * w
        lower = tl.minimum(cell + 1, h - 1).to(tl.int32) * w
        at_00, at_01, at_10, at_11 = upper + x, upper + next_x, lower + x, lower + next_x
        return image, row * W + column, inside, first < bottom, at_00, at_01, at_10, at_11, fx, fy

    @triton.jit
    @no_type_check
    def _interpolate(plane, at_00, at_01, at_10, at_11, fx, fy):
        upper = (1 - fx) * tl.load(plane + at_00).to(tl.float32)
        upper += fx * tl.load(plane + at_01).to(tl.float32)
        lower = (1 - fx) * tl.load(plane + at_10).to(tl.float32)
        lower += fx * tl.load(plane + at_11).to(tl.float32)
        return (1 - fy) * upper + fy * lower

    @triton.jit(do_not_specialize=_SIZES)
    @no_type_check
    def _loss_kernel(
        logits, labels, label_weights, smoothing_weights, everywhere, parts, lse_map,
        K, h, w, H, W, ignore_index,
        INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Each program sums the losses of a tile of pixels: one walk over the classes, with a running maximum."""
        image, at, inside, any_inside, at_00, at_01, at_10, at_11, fx, fy = _strip(h, w, H, W, INDEX, ROWS, COLUMNS)
        if not any_inside:
            return
        label = tl.load(labels + image * H * W + at, inside, 0).to(tl.int64)
        valid = inside & (label != ignore_index)
        is_class = (label >= 0) & (label < K)
        label = tl.where(is_class, label, 0)
        plane = logits + image * K * h * w
        at_label = _interpolate(plane + label * h * w, at_00, at_01, at_10, at_11, fx, fy)
        highest = tl.full((ROWS, COLUMNS), -3.4e38, tl.float32)  # finite: no difference of infinities
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        smoothed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(K):
            score = _interpolate(plane, at_00, at_01, at_10, at_11, fx, fy)
            is_higher = score > highest
            lower = tl.exp(-tl.abs(score - highest))  # one exponential serves both cases
            total = tl.where(is_higher, total * lower + 1, total + lower)
            highest = tl.where(is_higher, score, highest)
            if smoothing_weights is not None:
                smoothed += tl.load(smoothing_weights + k) * (at_label - score)
            plane += h * w
        factor = 1.0
        if label_weights is not None:
            factor = tl.load(label_weights + label)
        if smoothing_weights is not None:
            factor += tl.load(everywhere)
        loss = factor * (highest - at_label + tl.log(total)) + smoothed
        loss = tl.where(valid, tl.where(is_class, loss, float("nan")), 0)
        tl.store(parts + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))
        if lse_map is not None:
            lse = highest + tl.log(total)
            lse = tl.where(is_class & (lse < float("inf")), lse, float("nan"))
            lse = tl.where(valid, lse, float("inf"))  # the gradient kernel's sign of an ignored pixel: exp(u - inf) = 0
            tl.store(lse_map + image * H * W + at, lse, inside)

    @triton.jit
    @no_type_check
    def _add(pointers, values, mask):
        tl.store(pointers, tl.load(pointers, mask, 0.0) + values, mask)

    @triton.jit(do_not_specialize=_SIZES)
    @no_type_check
    def _gradient_kernel(
        logits, labels, lse_map, label_weights, smoothing_weights, everywhere,
        gradient, K, h, w, H, W, odd_y, odd_x, share,
        INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
    ):  # fmt: skip
        """Each program sums gradients of `share` classes over the pixels of a cell and adds them to its corners."""
        program = tl.program_id(0)
        shares = tl.cdiv(K, share)
        first = program % shares * share
        program = program // shares
        cells_x = (w + 2 - odd_x) // 2
        cells_y = (h + 2 - odd_y) // 2
        cell_x = (program % cells_x * 2 + odd_x - 1).to(INDEX)
        cell_y = (program // cells_x % cells_y * 2 + odd_y - 1).to(INDEX)
        image = (program // cells_x // cells_y).to(tl.int64)

        left = _first_pixel(cell_x, w, W)
        top = _first_pixel(cell_y, h, H)
        right = _first_pixel(cell_x + 1, w, W)
        bottom = _first_pixel(cell_y + 1, h, H)
        x0 = tl.maximum(cell_x, 0)
        y0 = tl.maximum(cell_y, 0)
        x1 = tl.minimum(cell_x + 1, w - 1)
        y1 = tl.minimum(cell_y + 1, h - 1)
        corner = image * h * w + y0 * w + x0
        from_00 = corner * K
        from_01 = (corner + x1 - x0) * K
        from_10 = (corner + (y1 - y0) * w) * K
        from_11 = (corner + (y1 - y0) * w + x1 - x0) * K
        K_01 = tl.where(x0 == x1, 0, K)  # at the border corners coincide, and one of them gets it all
        K_10 = tl.where(y0 == y1, 0, K)
        K_11 = tl.where(x0 == x1, 0, K_10)
        labels += image * H * W
        lse_map += image * H * W
        extra = 0.0
        if everywhere is not None:
            extra = tl.load(everywhere)

        # One warp's lanes hold the classes and its registers the pixels, so that sums over pixels stay within a thread.
        for start_x in range(left, right, COLUMNS):
            x = start_x + tl.arange(0, COLUMNS)
            fx = ((_source(x.to(INDEX), w, W) - cell_x * (2 * W)).to(tl.float32) / (2 * W))[None, :, None]
            for start_y in range(top, bottom, ROWS):
                y = start_y + tl.arange(0, ROWS)
                fy = ((_source(y.to(INDEX), h, H) - cell_y * (2 * H)).to(tl.float32) / (2 * H))[:, None]
                inside = (y < bottom)[:, None] & (x < right)[None, :]
                at = y[:, None] * W + x[None, :]
                lse = tl.load(lse_map + at, inside, float("inf"))
                label = tl.where(lse < float("inf"), tl.load(labels + at, inside, 0).to(tl.int32), -1)
                factor = 1.0
                if label_weights is not None:
                    factor = tl.load(label_weights + tl.maximum(label, 0))[:, :, None]
                lse = lse[:, :, None]
                label = label[:, :, None]
                for k in range(first, tl.minimum(first + share, K), CLASSES):
                    classes = k + tl.arange(0, CLASSES)
                    mask = classes < K
                    u_00 = tl.load(logits + from_00 + classes, mask, 0.0).to(tl.float32)[None, :]
                    u_01 = tl.load(logits + from_01 + classes, mask, 0.0).to(tl.float32)[None, :]
                    u_10 = tl.load(logits + from_10 + classes, mask, 0.0).to(tl.float32)[None, :]
                    u_11 = tl.load(logits + from_11 + classes, mask, 0.0).to(tl.float32)[None, :]
                    u_0 = ((1 - fy) * u_00 + fy * u_10)[:, None, :]  # (ROWS, CLASSES) -> (ROWS, 1, CLASSES)
                    u_1 = ((1 - fy) * u_01 + fy * u_11)[:, None, :]
                    p = tl.exp((1 - fx) * u_0 + fx * u_1 - lse)
                    slope = (factor + extra) * p - tl.where(classes[None, None, :] == label, factor, 0.0)
                    if smoothing_weights is not None:
                        smoothing = tl.load(smoothing_weights + classes, mask, 0.0)[None, None, :]
                        slope -= tl.where(label >= 0, smoothing, 0.0)
                    to_0 = tl.sum((1 - fx) * slope, 1)  # (ROWS, COLUMNS, CLASSES) -> (ROWS, CLASSES)
                    to_1 = tl.sum(fx * slope, 1)
                    to_00 = tl.sum((1 - fy) * to_0, 0)
                    to_01 = tl.sum((1 - fy) * to_1, 0)
                    to_10 = tl.sum(fy * to_0, 0)
                    to_11 = tl.sum(fy * to_1, 0)
                    to_00 += tl.where(x0 == x1, to_01, 0.0)
                    to_10 += tl.where(x0 == x1, to_11, 0.0)
                    to_00 += tl.where(y0 == y1, to_10, 0.0)
                    to_01 += tl.where(y0 == y1, to_11, 0.0)
                    _add(gradient + from_00 + classes, to_00, mask)
                    _add(gradient + from_01 + classes, to_01, classes < K_01)
                    _add(gradient + from_10 + classes, to_10, classes < K_10)
                    _add(gradient + from_11 + classes, to_11, classes < K_11)
                tl.debug_barrier()  # the next pixels add to the same corners

    @triton.jit(do_not_specialize=_SIZES)
    @no_type_check
    def _label_kernel(
        logits, labels, probability, K, h, w, H, W,
        INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Each program finds the highest score of each pixel of a tile in one walk over the classes."""
        image, at, inside, any_inside, at_00, at_01, at_10, at_11, fx, fy = _strip(h, w, H, W, INDEX, ROWS, COLUMNS)
        if not any_inside:
            return
        plane = logits + image * K * h * w
        highest = tl.full((ROWS, COLUMNS), -3.4e38, tl.float32)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        label = tl.zeros((ROWS, COLUMNS), tl.int32)
        for k in range(K):
            score = _interpolate(plane, at_00, at_01, at_10, at_11, fx, fy)
            is_higher = score > highest
            if probability is not None:
                lower = tl.exp(-tl.abs(score - highest))
                total = tl.where(is_higher, total * lower + 1, total + lower)
            highest = tl.where(is_higher, score, highest)
            label = tl.where(is_higher, k, label)
            plane += h * w
        tl.store(labels + image * H * W + at, label.to(labels.dtype.element_ty), inside)
        if probability is not None:
            tl.store(probability + image * H * W + at, 1 / total, inside)
