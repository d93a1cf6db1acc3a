"""Depth-wise convolutions of maps in channels_last on an NVIDIA GPU, in Triton.

PyTorch's own take several times as long as the memory bandwidth requires
(docs/performance.md). These take weights in float32 or in the precision of the map, and
accumulate in float32. A tile has pixels, counted through all images, and channels.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from mmengine.logging import print_log
from torch import Tensor

LAST = torch.channels_last
MOST_TAPS = 32  # of a kernel; PyTorch computes larger ones
# Larger tiles would not fit into registers, see tests/test_fast/test_kernels.py.
TILE = 2048  # numbers
TILE_OF_GRADIENTS = 8192  # bytes


@triton.jit
def _tap(x, here, row, column, inside, dy, dx, height, width, channels):
    """The values dy rows and dx columns away."""
    row, column = row + dy, column + dx
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + here + (dy * width + dx) * channels, mask=inside, other=0).to(tl.float32)


@triton.jit
def _convolve(
    x, taps, bias, out, height, width, channels, pixels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)[:, None]
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    inside = (n < pixels) & (c < channels)
    here, row, column = n.to(tl.int64) * channels + c, n // width % height, n % width
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    total += tl.load(bias + c, mask=c < channels, other=0).to(tl.float32)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            dy, dx = (i - ROWS // 2) * DILATION, (j - COLUMNS // 2) * DILATION
            value = _tap(x, here, row, column, inside, dy, dx, height, width, channels)
            tap = taps + (i * COLUMNS + j) * channels + c
            total += value * tl.load(tap, mask=c < channels, other=0).to(tl.float32)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    x, taps, grad, out, sums, height, width, channels, pixels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the map, and a tile's share of those of the taps and the bias."""
    n = tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)[:, None]
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    inside = (n < pixels) & (c < channels)
    here, row, column = n.to(tl.int64) * channels + c, n // width % height, n % width
    value = tl.load(x + here, mask=inside, other=0).to(tl.float32)
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    share = sums + tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS + 1) * channels + c
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            dy, dx = (ROWS // 2 - i) * DILATION, (COLUMNS // 2 - j) * DILATION
            above = _tap(grad, here, row, column, inside, dy, dx, height, width, channels)
            tap = taps + (i * COLUMNS + j) * channels + c
            total += above * tl.load(tap, mask=c < channels, other=0).to(tl.float32)
            tl.store(share, tl.sum(above * value, 0)[None, :], mask=c < channels)
            share += channels
            if i == ROWS // 2 and j == COLUMNS // 2:
                end = share + (ROWS * COLUMNS // 2) * channels
                tl.store(end, tl.sum(above, 0)[None, :], mask=c < channels)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


# --- Launches ---------------------------------------------------------------------------


def _tiles(x: Tensor, numbers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the number of tiles, and the size of one, in pixels and channels."""
    batch, channels, height, width = x.shape
    wide = min(64, 1 << (channels - 1).bit_length())
    high = numbers // wide
    return (-(-batch * height * width // high), -(-channels // wide)), (high, wide)


def _launch(kernel: Any, grid: tuple, tensors: tuple, sizes: list[int], tile: tuple) -> None:
    batch, channels, height, width = tensors[0].shape
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, height, width, channels, batch * height * width, *sizes, *tile)


def _forward(kernel: Any, x: Tensor, taps: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
    out, (grid, tile) = torch.empty_like(x), _tiles(x, TILE)
    _launch(kernel, grid, (x, taps, bias, out), sizes, tile)
    return out


def _backward(
    kernel: Any, x: Tensor, taps: Tensor, grad: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The gradient of the map, and those of the taps and the bias, (taps + 1, C) in float32."""
    out, (grid, tile) = torch.empty_like(x), _tiles(x, TILE_OF_GRADIENTS // x.element_size())
    sums = taps.new_empty((grid[0], len(taps) + 1, taps.shape[1]), dtype=torch.float32)
    _launch(kernel, grid, (x, taps, grad.contiguous(memory_format=LAST), out, sums), sizes, tile)
    return out, sums.sum(0)


def _prepared(x: Tensor) -> Tensor:
    """Return a map in channels_last, in the precision of autocast."""
    if torch.is_autocast_enabled('cuda'):
        x = x.to(torch.get_autocast_dtype('cuda'))
    return x.contiguous(memory_format=LAST)


def _taps(weight: Tensor) -> Tensor:
    """Return the weights (taps, C) of kernels (C, 1, rows, columns): channels are adjacent."""
    return weight.flatten(1).t().contiguous()


# --- In eager mode ----------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        taps, ctx.sizes = _taps(weight), [*weight.shape[2:], dilation]
        ctx.save_for_backward(x, weight, taps)
        with _or_not(x.get_device()):
            return _forward(_convolve, x, taps, bias, ctx.sizes)
        return torch.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), *_plain(ctx.sizes), len(bias))

    @staticmethod
    def backward(ctx, grad):
        x, weight, taps = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no second derivatives are needed
            with _or_not(x.get_device()):
                grad_x, sums = _backward(_differentiate, x, taps, grad, ctx.sizes)
                sums = sums.to(weight.dtype)
                return grad_x, sums[:-1].t().reshape(weight.shape), sums[-1], None
        stride, padding, dilation = _plain(ctx.sizes)
        return *torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), [len(weight)], stride, padding, dilation, False, (0, 0),
            len(weight), ctx.needs_input_grad[:3],
        ), None  # fmt: skip


def _plain(sizes: list[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """PyTorch's stride, padding and dilation."""
    rows, columns, dilation = sizes
    return (1, 1), (dilation * (rows // 2), dilation * (columns // 2)), (dilation, dilation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """A depth-wise convolution that keeps height and width.

    Args:
        x: (B, C, H, W), float32 or half precision; under autocast in any of them.
        weight: (C, 1, rows, columns), both odd.
        bias: (C,).
        dilation: Of both axes.

    Returns:
        (B, C, H, W) in channels_last, in the precision of ``x`` or of autocast.
    """
    return _Convolution.apply(_prepared(x), weight, bias, dilation)


_works: dict[int, bool] = {}


@contextmanager
def _or_not(gpu: int) -> Iterator[None]:
    """Log an error of Triton, and use PyTorch's convolutions on a GPU from then on."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # from its compiler, the C compiler, or the driver
        _works[gpu] = False
        print_log(
            f"LSKA-VAN uses PyTorch's depth-wise convolutions on GPU {gpu}, which are several "
            f'times slower than its own: {error}', 'current', logging.WARNING,
        )  # fmt: skip


@torch.compiler.assume_constant_result
def works(gpu: int) -> bool:
    """Tell whether Triton can compile for a GPU, which needs a C compiler; or log why not."""
    if gpu not in _works:
        _works[gpu] = True
        with _or_not(gpu):
            if torch.cuda.get_device_capability(gpu) < (8, 0):
                raise RuntimeError('it is older than compute capability 8.0')
            x = torch.zeros(1, 1, 1, 1, device=f'cuda:{gpu}')
            _forward(_convolve, x, x.flatten(1), x.flatten(), [1, 1, 1])
    return _works[gpu]


# --- In compiled graphs -----------------------------------------------------------------

if hasattr(torch.library, 'triton_op'):

    def _wrap(kernel: Any) -> Any:  # not for Triton's interpreter
        return (
            torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
        )

    @torch.library.triton_op('lska_mm::depthwise', mutates_args=())
    def _operator(x: Tensor, taps: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        return _forward(_wrap(_convolve), x, taps, bias, sizes)

    @torch.library.triton_op('lska_mm::depthwise_backward', mutates_args=())
    def _gradients(
        x: Tensor, taps: Tensor, grad: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        return _backward(_wrap(_differentiate), x, taps, grad, sizes)

    def _save(ctx, inputs, output):
        x, taps, bias, ctx.sizes = inputs
        ctx.save_for_backward(x, taps)
        ctx.dtype = bias.dtype

    def _differentiate_operator(ctx, grad):
        grad_x, sums = _gradients(*ctx.saved_tensors, grad, ctx.sizes)
        sums = sums.to(ctx.dtype)
        return grad_x, sums[:-1], sums[-1], None

    _operator.register_autograd(_differentiate_operator, setup_context=_save)


def convolve_in_graph(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Like `convolve`, as an operator with its own gradient for `torch.compile`."""
    sizes = [*weight.shape[2:], dilation]
    return torch.ops.lska_mm.depthwise(_prepared(x), _taps(weight), bias, sizes)
