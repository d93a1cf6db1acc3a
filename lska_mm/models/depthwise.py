"""Depth-wise convolutions on an NVIDIA GPU, in Triton.

PyTorch's own take 4 to 40 times what the memory needs (docs/performance.md). These read
a map a tile of pixels and channels at a time, in either layout, take the weights as they
are stored, in whatever precision the map is, and compute in float32.
"""

import functools
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from mmengine.logging import print_log
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import triton_op, wrap_triton

MOST_TAPS = 32  # of a kernel; larger ones are left to PyTorch
TILE, WARPS = 4096, 4  # numbers in a tile of a map, and warps that compute it
TILE_OF_WEIGHTS, WARPS_OF_WEIGHTS = 512, 4  # of the weights' gradient
PROGRAMS = 1024  # of the weights' gradient, about
GROUP = tl.constexpr(4)  # taps whose gradients are summed by a program


@triton.jit
def _locate(n, c, area, width, batch_stride, channel_stride, pixel_stride):
    """Offset, row and column of the n-th pixel of all images."""
    image = n // area
    pixel = n - image * area
    row = pixel // width
    here = image.to(tl.int64) * batch_stride + pixel * pixel_stride + c * channel_stride
    return here, row, pixel - row * width


@triton.jit
def _tap(x, here, row, column, inside, dy, dx, height, width, pixel_stride):
    """The values that lie dy rows and dx columns from those that are computed."""
    row, column = row + dy, column + dx
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = x + here + (dy * width + dx) * pixel_stride
    return tl.load(place, mask=inside, other=0).to(tl.float32)


@triton.jit
def _convolve(
    x, weight, bias, out, height, width, channels, pixels,
    batch_stride, channel_stride, pixel_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr, TURNED: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)[:, None]
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    inside = (n < pixels) & (c < channels)
    here, row, column = _locate(
        n, c, height * width, width, batch_stride, channel_stride, pixel_stride
    )
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            dy, dx = (i - ROWS // 2) * DILATION, (j - COLUMNS // 2) * DILATION
            value = _tap(x, here, row, column, inside, dy, dx, height, width, pixel_stride)
            tap = i * COLUMNS + j
            if TURNED:
                tap = ROWS * COLUMNS - 1 - tap
            factor = tl.load(weight + c * (ROWS * COLUMNS) + tap, mask=c < channels, other=0)
            total += value * factor.to(tl.float32)
    if not TURNED:
        total += tl.load(bias + c, mask=c < channels, other=0).to(tl.float32)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_taps(
    x, grad, out, height, width, channels, pixels, share,
    batch_stride, channel_stride, pixel_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DILATION: tl.constexpr,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of GROUP taps, and of the bias, from a share of the pixels."""
    c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)[None, :]
    first = tl.program_id(2) * GROUP
    total_0 = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    total_1, total_2, total_3, total_bias = total_0, total_0, total_0, total_0
    for start in range(0, share, TILE_PIXELS):
        n = tl.program_id(0) * share + start + tl.arange(0, TILE_PIXELS)[:, None]
        inside = (n < pixels) & (c < channels)
        here, row, column = _locate(
            n, c, height * width, width, batch_stride, channel_stride, pixel_stride
        )
        above = tl.load(grad + here, mask=inside, other=0).to(tl.float32)
        total_bias += above
        for i in tl.static_range(GROUP):
            tap = first + i
            dy = (tap // COLUMNS - ROWS // 2) * DILATION
            dx = (tap % COLUMNS - COLUMNS // 2) * DILATION
            known = inside & (tap < ROWS * COLUMNS)
            value = above * _tap(x, here, row, column, known, dy, dx, height, width, pixel_stride)
            if i == 0:
                total_0 += value
            elif i == 1:
                total_1 += value
            elif i == 2:
                total_2 += value
            else:
                total_3 += value
    out += tl.program_id(0) * channels * (ROWS * COLUMNS + 1)
    for i in tl.static_range(GROUP):
        tap = first + i
        if i == 0:
            total = tl.sum(total_0, 0)
        elif i == 1:
            total = tl.sum(total_1, 0)
        elif i == 2:
            total = tl.sum(total_2, 0)
        else:
            total = tl.sum(total_3, 0)
        place = out + c * (ROWS * COLUMNS) + tap
        tl.store(place, total[None, :], mask=(c < channels) & (tap < ROWS * COLUMNS))
    place = out + channels * (ROWS * COLUMNS) + c
    tl.store(place, tl.sum(total_bias, 0)[None, :], mask=(c < channels) & (first == 0))


def _parts(whole: int, part: int) -> int:
    """How many parts there are."""
    return -(-whole // part)


def _tile(x: Tensor, numbers: int) -> tuple[int, int]:
    """Pixels and channels of a tile: neighbors in memory."""
    if x.is_contiguous():
        return numbers, 1
    channels = min(64, 1 << (x.shape[1] - 1).bit_length())
    return numbers // channels, channels


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of images, channels and pixels."""
    return x.stride(0), x.stride(1), 1 if x.is_contiguous() else x.shape[1]


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, turned: bool, wrap: Any
) -> Tensor:
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[2:]
    pixels, out = batch * height * width, torch.empty_like(x)
    tile = _tile(x, TILE)
    wrap(_convolve)[_parts(pixels, tile[0]), _parts(channels, tile[1])](
        x, weight, bias, out, height, width, channels, pixels, *_strides(x),
        rows, columns, dilation, turned, *tile, num_warps=WARPS,
    )  # fmt: skip
    return out


def _weight_gradients(
    x: Tensor, grad: Tensor, rows: int, columns: int, dilation: int, wrap: Any
) -> Tensor:
    batch, channels, height, width = x.shape
    pixels, tile = batch * height * width, _tile(x, TILE_OF_WEIGHTS)
    blocks, groups = _parts(channels, tile[1]), _parts(rows * columns, GROUP.value)
    shares = max(1, min(_parts(pixels, tile[0]), PROGRAMS // (blocks * groups)))
    share = _parts(_parts(pixels, shares), tile[0]) * tile[0]
    shares = _parts(pixels, share)
    out = torch.empty(shares, channels * (rows * columns + 1), device=x.device)
    wrap(_sum_taps)[shares, blocks, groups](
        x, grad, out, height, width, channels, pixels, share, *_strides(x),
        rows, columns, dilation, *tile, num_warps=WARPS_OF_WEIGHTS,
    )  # fmt: skip
    return out.sum(0)


@triton_op('lska_mm::depthwise_convolution', mutates_args=())
def _convolution_in_graph(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, turned: bool
) -> Tensor:
    return _convolution(x, weight, bias, dilation, turned, wrap_triton)


@triton_op('lska_mm::depthwise_weight_gradients', mutates_args=())
def _weight_gradients_in_graph(
    x: Tensor, grad: Tensor, rows: int, columns: int, dilation: int
) -> Tensor:
    return _weight_gradients(x, grad, rows, columns, dilation, wrap_triton)


def _run(eager: Any, in_graph: Any, x: Tensor, *args: Any) -> Tensor:
    """Launch a kernel, or make it part of a graph."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return in_graph(x, *args)
    with torch.cuda.device_of(x):
        return eager(x, *args, lambda kernel: kernel)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ctx.dilation, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    channels, _, rows, columns = weight.shape
    dilation, needed = ctx.dilation, ctx.needs_input_grad
    if torch.is_grad_enabled():  # gradients of these are wanted, too
        padding = dilation * (rows // 2), dilation * (columns // 2)
        return *torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), [channels], (1, 1), padding, (dilation, dilation),
            False, (0, 0), channels, needed[:3],
        ), None, None  # fmt: skip
    grad_x = grad_weight = grad_bias = None
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    grad = grad.contiguous(memory_format=layout)
    if needed[0]:
        grad_x = _run(_convolution, _convolution_in_graph, grad, weight, weight, dilation, True)
    if any(needed[1:3]):
        found = _run(
            _weight_gradients, _weight_gradients_in_graph, x, grad, rows, columns, dilation
        ).to(weight.dtype)
        grad_weight, grad_bias = found[: weight.numel()].view_as(weight), found[weight.numel() :]
    return grad_x, grad_weight, grad_bias, None, None


class _Convolution(torch.autograd.Function):
    """The op above without its dispatch, which takes longer than a kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = _run(_convolution, _convolution_in_graph, *args)
        _save(ctx, args, out)
        return out

    backward = staticmethod(_backward)


_convolution_in_graph.register_autograd(_backward, setup_context=_save)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """A depth-wise convolution that keeps height and width.

    Args:
        x: (B, C, H, W), float32 or half precision; under autocast in any of them.
        weight: (C, 1, rows, columns), both odd.
        bias: (C,).
        dilation: Of both axes.

    Returns:
        (B, C, H, W), in the precision of ``x`` or of autocast, in the layout of ``x``.
    """
    if torch.is_autocast_enabled('cuda'):
        x = x.to(torch.get_autocast_dtype('cuda'))
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    run = _convolution_in_graph if is_compiling() else _Convolution.apply
    return run(x, weight, bias, dilation, False)


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
            f'LSKA-VAN takes PyTorch\'s depth-wise convolutions on GPU {gpu}, which are several '
            f'times as slow as its own: {error}', 'current', logging.WARNING,
        )  # fmt: skip
        return False
    return True
