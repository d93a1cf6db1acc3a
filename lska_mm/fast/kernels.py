"""Depth-wise convolutions of maps in channels_last on an NVIDIA GPU, in Triton.

PyTorch's own take several times what the memory needs (docs/performance.md).
These take weights as they are stored, whatever the precision of the map, and add in
float32. A tile is of pixels, counted through all images, and of channels.
"""

import functools
import logging

import torch
import triton
import triton.language as tl
from mmengine.logging import print_log
from torch import Tensor

LAST = torch.channels_last
MOST_TAPS = 32  # of a kernel; larger ones are left to PyTorch
TILE, TILE_OF_WEIGHTS = 4096, 512  # numbers in a tile: of a map, and for the weights' gradients
PROGRAMS = 1024  # that add up the weights' gradients, about
GROUP = tl.constexpr(4)  # taps whose gradients a program adds up


@triton.jit
def _tap(x, here, row, column, inside, dy, dx, height, width, channels):
    """The values dy rows and dx columns from those that are computed."""
    row, column = row + dy, column + dx
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + here + (dy * width + dx) * channels, mask=inside, other=0).to(tl.float32)


@triton.jit
def _convolve(
    x, weight, bias, out, height, width, channels, pixels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr, TURNED: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The convolution; with its kernel turned by 180 degrees, and no bias, its gradient."""
    n = tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)[:, None]
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    inside = (n < pixels) & (c < channels)
    here, row, column = n.to(tl.int64) * channels + c, n // width % height, n % width
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            dy, dx = (i - ROWS // 2) * DILATION, (j - COLUMNS // 2) * DILATION
            value = _tap(x, here, row, column, inside, dy, dx, height, width, channels)
            tap = i * COLUMNS + j
            if TURNED:
                tap = ROWS * COLUMNS - 1 - tap
            factor = tl.load(weight + c * (ROWS * COLUMNS) + tap, mask=c < channels, other=0)
            total += value * factor.to(tl.float32)
    if not TURNED:
        total += tl.load(bias + c, mask=c < channels, other=0).to(tl.float32)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_sum(out, total, c, tap, channels, TAPS: tl.constexpr):
    place = out + c * TAPS + tap
    tl.store(place, tl.sum(total, 0)[None, :], mask=(c < channels) & (tap < TAPS))


@triton.jit
def _sum_gradients(
    x, grad, out, height, width, channels, pixels, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of GROUP taps, and of the bias, from a share of the pixels."""
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    first = tl.program_id(2) * GROUP
    bias = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    sum_0, sum_1, sum_2, sum_3 = bias, bias, bias, bias
    for start in range(0, share, TILE_PIXELS):
        n = tl.program_id(0) * share + start + tl.arange(0, TILE_PIXELS)[:, None]
        inside = (n < pixels) & (c < channels)
        here, row, column = n.to(tl.int64) * channels + c, n // width % height, n % width
        above = tl.load(grad + here, mask=inside, other=0).to(tl.float32)
        bias += above
        for i in tl.static_range(GROUP):
            tap = first + i
            dy = (tap // COLUMNS - ROWS // 2) * DILATION
            dx = (tap % COLUMNS - COLUMNS // 2) * DILATION
            known = inside & (tap < ROWS * COLUMNS)
            value = above * _tap(x, here, row, column, known, dy, dx, height, width, channels)
            if i == 0:
                sum_0 += value
            elif i == 1:
                sum_1 += value
            elif i == 2:
                sum_2 += value
            else:
                sum_3 += value
    out += tl.program_id(0) * channels * (ROWS * COLUMNS + 1)
    _store_sum(out, sum_0, c, first, channels, ROWS * COLUMNS)
    _store_sum(out, sum_1, c, first + 1, channels, ROWS * COLUMNS)
    _store_sum(out, sum_2, c, first + 2, channels, ROWS * COLUMNS)
    _store_sum(out, sum_3, c, first + 3, channels, ROWS * COLUMNS)
    _store_sum(out + channels * (ROWS * COLUMNS), bias, c, first, channels, 1)


def _tile(channels: int, numbers: int) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    width = min(64, 1 << (channels - 1).bit_length())
    return numbers // width, width


def _parts(whole: int, part: int) -> int:
    """How many parts there are."""
    return -(-whole // part)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int, turned: bool) -> Tensor:
    batch, channels, height, width = x.shape
    pixels, tile, out = batch * height * width, _tile(channels, TILE), torch.empty_like(x)
    with torch.cuda.device_of(x):
        _convolve[_parts(pixels, tile[0]), _parts(channels, tile[1])](
            x, weight, bias, out, height, width, channels, pixels,
            *weight.shape[2:], dilation, turned, *tile,
        )  # fmt: skip
    return out


def _gradients(x: Tensor, grad: Tensor, rows: int, columns: int, dilation: int) -> Tensor:
    """The weights' gradients, then the bias's, in float32."""
    batch, channels, height, width = x.shape
    pixels, tile = batch * height * width, _tile(channels, TILE_OF_WEIGHTS)
    blocks, groups = _parts(channels, tile[1]), _parts(rows * columns, GROUP.value)
    shares = max(1, min(_parts(pixels, tile[0]), PROGRAMS // (blocks * groups)))
    share = _parts(_parts(pixels, shares), tile[0]) * tile[0]
    shares = _parts(pixels, share)
    numbers = channels * (rows * columns + 1)
    out = torch.empty(shares, numbers, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _sum_gradients[shares, blocks, groups](
            x, grad, out, height, width, channels, pixels, share, rows, columns, dilation, *tile
        )
    return out.sum(0)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolution(x, weight, bias, dilation, False)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        channels, _, rows, columns = weight.shape
        dilation, needed = ctx.dilation, ctx.needs_input_grad
        if torch.is_grad_enabled():  # gradients of these are wanted, too
            padding = dilation * (rows // 2), dilation * (columns // 2)
            return *torch.ops.aten.convolution_backward(
                grad, x, weight.to(x.dtype), [channels], (1, 1), padding, (dilation, dilation),
                False, (0, 0), channels, needed[:3],
            ), None  # fmt: skip
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous(memory_format=LAST)
        if needed[0]:
            grad_x = _convolution(grad, weight, weight, dilation, True)
        if any(needed[1:3]):
            found = _gradients(x, grad, rows, columns, dilation).to(weight.dtype)
            grad_weight, grad_bias = found.split([weight.numel(), channels])
            grad_weight = grad_weight.view_as(weight)
        return grad_x, grad_weight, grad_bias, None


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
    if torch.is_autocast_enabled('cuda'):
        x = x.to(torch.get_autocast_dtype('cuda'))
    x = x.contiguous(memory_format=LAST)
    return _Convolution.apply(x, weight.contiguous(), bias.contiguous(), dilation)


@functools.cache
def works(gpu: int) -> bool:
    """Tell whether Triton can compile for a GPU, which takes a C compiler; or log why not."""
    try:
        if torch.cuda.get_device_capability(gpu) < (8, 0):
            raise RuntimeError('it is older than compute capability 8.0')
        x = torch.zeros(1, 1, 1, 1, device=f'cuda:{gpu}')
        convolve(x, x, x.flatten(), 1)
    except Exception as error:
        print_log(
            f"LSKA-VAN takes PyTorch's depth-wise convolutions on GPU {gpu}, which are several "
            f'times as slow as its own: {error}', 'current', logging.WARNING,
        )  # fmt: skip
        return False
    return True
