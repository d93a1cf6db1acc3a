"""The kernels for a GPU, by Triton's interpreter, which needs none."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from conftest import ROOT

CONVOLUTIONS = """
import torch
from lska_mm.fast import kernels
kernels.TILE, kernels.TILE_OF_WEIGHTS = 2048, 1024  # several tiles, and shares
torch.manual_seed(0)
for rows, columns, dilation in [(1, 5, 1), (7, 1, 3), (3, 3, 1), (1, 17, 3)]:
    for channels in (5, 80):
        x, grad = (torch.randn(2, channels, 9, 7).contiguous(memory_format=torch.channels_last)
                   for _ in range(2))
        weight, bias = torch.randn(channels, 1, rows, columns), torch.randn(channels)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        padding = dilation * (rows // 2), dilation * (columns // 2)
        expected = torch.nn.functional.conv2d(*exact, 1, padding, dilation, channels)
        found = kernels.convolve(*inputs, dilation)
        assert found.stride() == x.stride()
        pairs = [(found, expected)]
        pairs += zip(torch.autograd.grad(found, inputs, grad),
                     torch.autograd.grad(expected, exact, grad.double(), create_graph=True))
        for one, other in pairs:
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        twice = torch.autograd.grad(kernels.convolve(*inputs, dilation), x, grad,
                                    create_graph=True)[0].square().sum()
        torch.autograd.grad(twice, weight)
        half = kernels.convolve(x.bfloat16(), weight, bias, dilation)
        assert half.dtype == torch.bfloat16
        assert (half - expected).abs().max() <= 1e-2 * expected.abs().max()
if not torch.cuda.is_available():  # the log says that, and why
    assert not kernels.works(0)
torch.set_default_dtype(torch.float16)  # of another part of the process
weight, x = torch.ones(1, 1, 1, 5).float().requires_grad_(), torch.ones(1, 1, 200, 200).float()
kernels.convolve(3 * x, weight, torch.zeros(1).float(), 1).sum().backward()
assert weight.grad[0, 0, 0, 2] == 3 * 200 * 200
print('equal')
"""
MODEL = """
import copy
import torch
from mmcv.ops import SyncBatchNorm
from conftest import trained
from lska_mm import LSKA
from lska_mm.fast import door, gpu, kernels
kernels.TILE = kernels.TILE_OF_WEIGHTS = 4096
images = torch.rand(2, 3, 32, 32)
def outputs(model):
    outs = model(images)
    sum((out * out).mean() for out in outs).backward()
    return [out.detach() for out in outs], [p.grad for p in model.parameters()]
plain = trained().train()
other, deployed = copy.deepcopy(plain), copy.deepcopy(plain).eval()
expected, used, convolve = outputs(plain), [], kernels.convolve
with torch.no_grad():
    wanted = deployed(images)
door.cpu, gpu.kernels = gpu, kernels  # as if a GPU were there, and the images large
gpu._has_kernels, gpu.LARGE = lambda x: True, 1
kernels.convolve = lambda x, *more: used.append(x.shape) or convolve(x, *more)
found = outputs(other)
assert len(used) == 15
with torch.no_grad():
    pairs = [(deployed(images), wanted)]
    deployed.switch_to_deploy()
    pairs.append((deployed(images), wanted))
assert len(used) == 45
for ones, others in [*zip(found, expected), *pairs]:
    largest = max(t.abs().max() for t in others)
    for one, other in zip(ones, others, strict=True):
        assert (one - other).abs().max() <= 1e-4 * largest
norm = SyncBatchNorm.__new__(SyncBatchNorm)
torch.nn.Module.__init__(norm)
for module in (norm, LSKA(8, 23, 'LKA')):  # reads NCHW; has kernels of 7 x 7
    assert not gpu.prefers_channels_last(images, torch.nn.Sequential(plain, module))
print('equal')
"""


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype') or not find_spec('triton'),
                    reason='the kernels need torch 2.4, and Triton')  # fmt: skip
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= '2.5.0',
                    reason="Triton's interpreter does not know this NumPy")  # fmt: skip
@pytest.mark.parametrize('code', [CONVOLUTIONS, MODEL], ids=['convolutions', 'model'])
def test_by_the_interpreter(code):
    environment = dict(TRITON_INTERPRET='1', PYTHONPATH=str(ROOT / 'tests'), OMP_NUM_THREADS='1')
    result = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.endswith('equal\n'), result.stdout[-3000:]
    if code is CONVOLUTIONS and not torch.cuda.is_available():
        assert "takes PyTorch's depth-wise convolutions on GPU 0" in result.stdout
