"""The kernels for a GPU without one: by Triton's interpreter, in graphs, and as machine code."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT

CONVOLUTIONS = """
import itertools
import torch
from lska_mm.fast import kernels
from lska_mm.models.lska import kernel_layout
kernels.TILE, kernels.TILE_OF_GRADIENTS = 1024, 8192  # several tiles
torch.manual_seed(0)
published = {layout for k in (7, 11, 23, 35, 53) for layout in kernel_layout('LSKA', k).values()}
precise = [((2, channels, 9, 7), *layout, torch.float32) for channels in (5, 80)
           for layout in (((3, 3), 1), ((1, 7), 3), ((17, 1), 3))]
types = itertools.cycle((torch.float16, torch.bfloat16))
half = [((2, 20, 5, 11), *layout, next(types)) for layout in sorted(published) + [((3, 3), 1)]]
small = [((1, 8, 1, 1), (3, 3), 1, torch.float32), ((0, 8, 5, 5), (1, 7), 3, torch.float32)]
for shape, (rows, columns), dilation, dtype in precise + half + small:
    channels = shape[1]
    x, grad = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(channels, 1, rows, columns), torch.randn(channels)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    padding = dilation * (rows // 2), dilation * (columns // 2)
    expected = torch.nn.functional.conv2d(*exact, 1, padding, dilation, channels)
    found = kernels.convolve(*inputs, dilation)
    assert found.stride() == x.stride() and found.dtype == dtype
    pairs = [(found, expected), *zip(torch.autograd.grad(found, inputs, grad),
                                     torch.autograd.grad(expected, exact, grad.double()))]
    for one, other in pairs if len(x) else pairs[2:]:
        error, largest = (one - other).abs().max(), other.abs().max()
        assert error <= max(1e-5, torch.finfo(dtype).eps) * largest, (dtype, rows, columns)
    if dtype == torch.float32 and len(x):
        twice = torch.autograd.grad(kernels.convolve(*inputs, dilation), x, grad,
                                    create_graph=True)[0].square().sum()
        torch.autograd.grad(twice, weight)
if not torch.cuda.is_available():  # the log says that, and why
    assert not kernels.works(0)
torch.set_default_dtype(torch.float16)  # of another part of the process
weight, x = torch.ones(1, 1, 1, 5).float().requires_grad_(), torch.ones(1, 1, 200, 200).float()
kernels.convolve(3 * x, weight, torch.zeros(1).float(), 1).sum().backward()
assert weight.grad[0, 0, 0, 2] == 3 * 200 * 200

def refuse(*arguments):
    raise OSError('no compiler')
kernels._launch, kernels._works[-1] = refuse, True  # PyTorch's own, which a line in the log tells
again = weight.detach().clone().requires_grad_()
kernels.convolve(3 * x, again, torch.zeros(1).float(), 1).sum().backward()
assert (again.grad - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()
assert not kernels.works(-1)
print('equal')
"""
MODEL = """
import copy
import torch
from mmcv.ops import SyncBatchNorm
from conftest import trained
from lska_mm import LSKA
from lska_mm.fast import door, gpu, kernels
kernels.TILE, kernels.TILE_OF_GRADIENTS = 4096, 16384
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
kernels.works, gpu.large = lambda gpu: True, lambda gpu: 1
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
    assert gpu.wants_nchw(torch.nn.Sequential(plain, module))
assert not gpu.wants_nchw(plain)
print('equal')
"""
GRAPHS = """
import copy
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from conftest import trained
from lska_mm.fast import compiled, door, gpu, kernels
kernels.TILE, kernels.TILE_OF_GRADIENTS = 4096, 16384
device, kernels.works, gpu.kernels = door._device, lambda gpu: True, kernels  # as if on a GPU
door._device = lambda x: (
    (compiled if compiled.runs_here() else None) if door.is_compiling() else device(x))
# shapes, which the compiler cannot see of kernels that Triton interprets
torch.library.register_fake('lska_mm::depthwise', lambda x, taps, bias, sizes: torch.empty_like(x))
torch.library.register_fake('lska_mm::depthwise_backward', lambda x, taps, grad, sizes: (
    torch.empty_like(x), taps.new_empty(len(taps) + 1, x.shape[1])))
graphs = []
def keep(graph, inputs):
    graphs.append(graph)
    return graph
def ours(graph):
    return [str(node.target) for node in graph.graph.nodes if 'lska_mm' in str(node.target)]
def outputs(model, images):
    model.zero_grad()
    outs = model(images)
    sum((out * out).mean() for out in outs).backward()
    return [out.detach() for out in outs], [p.grad for p in model.parameters()]
def compare(model, sizes):
    for size in sizes:
        images = torch.rand(2, 3, *size)
        for ones, others in zip(outputs(model, images), outputs(plain, images), strict=True):
            largest = max(t.abs().max() for t in others)
            for one, other in zip(ones, others, strict=True):
                assert (one - other).abs().max() <= 1e-4 * largest
arch = dict(embed_dims=[8, 16], depths=[1, 1], ffn_ratios=[4, 2])
plain, backend = trained(arch=arch).train(), aot_autograd(fw_compiler=keep, bw_compiler=keep)
with config.patch(decompose_custom_triton_ops=False):
    for dynamic, sizes in (False, [(32, 32)]), (True, [(32, 48), (48, 64)]):
        graphs.clear()
        model = copy.deepcopy(plain)
        model.compile(backend=backend, fullgraph=True, dynamic=dynamic)
        compare(model, sizes)
        forward, backward = graphs  # one of each, for all sizes
        assert ours(forward) == 10 * ['lska_mm.depthwise.default']
        assert ours(backward) == 10 * ['lska_mm.depthwise_backward.default']
    graphs.clear()
    model = copy.deepcopy(plain)
    for branch in (model.block1[0].attn, model.block1[0].mlp):  # as CompileHook with SyncBN
        branch.compile(backend=backend, fullgraph=True)
    model.block1[0].attn.proj_1.register_forward_hook(lambda module, inputs, out: 1 * out)
    compare(model, [(32, 32)])
    assert [len(ours(graph)) for graph in graphs] == [4, 1, 1, 4]  # hooks leave the gate alone
for strict in (False, True):
    program = torch.export.export(plain.eval(), (torch.rand(1, 3, 32, 32),), strict=strict)
    assert not ours(program)
print('equal')
"""
needs_triton = pytest.mark.skipif(
    not hasattr(torch, 'get_autocast_dtype') or not find_spec('triton'),
    reason='the kernels need torch 2.4, and Triton',
)


@needs_triton
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= '2.5.0',
                    reason="Triton's interpreter does not know this NumPy")  # fmt: skip
@pytest.mark.parametrize('code', [CONVOLUTIONS, MODEL, GRAPHS],
                         ids=['convolutions', 'model', 'graphs'])  # fmt: skip
def test_by_the_interpreter(code):
    if code is GRAPHS and not hasattr(torch.library, 'triton_op'):
        pytest.skip('operators of Triton need torch 2.6')
    paths = os.pathsep.join([str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = dict(TRITON_INTERPRET='1', PYTHONPATH=paths, OMP_NUM_THREADS='1')
    result = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.endswith('equal\n'), result.stdout[-3000:]
    if code is CONVOLUTIONS and not torch.cuda.is_available():
        for reason in ('on GPU 0, which', 'no compiler'):
            assert reason in result.stdout


@needs_triton
@pytest.mark.parametrize(
    ('arch', 'precision', 'rows', 'columns'),
    [
        *((arch, 'bf16', 1, 17) for arch in (80, 89, 90)),
        (90, 'fp32', 3, 3),
        *(
            pytest.param(arch, precision, *kernel, marks=pytest.mark.soak)
            for arch in (80, 89, 90)
            for precision in ('bf16', 'fp16', 'fp32')
            for kernel in ((3, 3), (1, 7), (11, 1), (17, 1), (1, 21), (1, 31))
        ),
    ],
)
def test_registers(tmp_path, arch, precision, rows, columns):
    """No value is kept in memory for want of registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lska_mm.fast import kernels

    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    if not tool.exists():
        pytest.skip('this Triton comes without cuobjdump')
    types = dict.fromkeys(('x', 'grad', 'out'), f'*{precision}')
    types.update(dict.fromkeys(('taps', 'bias', 'sums'), '*fp32'))
    numbers = dict.fromkeys(('height', 'width', 'channels', 'pixels'), 'i32')
    x = torch.empty(1, 64, 1, 1, dtype=dict(bf16=torch.bfloat16, fp16=torch.half).get(precision))
    for kernel, size in (
        (kernels._convolve, kernels.TILE),
        (kernels._differentiate, kernels.TILE_OF_GRADIENTS // x.element_size()),
    ):
        tile = dict(zip(('TILE_PIXELS', 'TILE_CHANNELS'), kernels._tiles(x, size)[1]))
        constants = dict(ROWS=rows, COLUMNS=columns, DILATION=3, **tile)
        signature = {
            name: {**types, **numbers}.get(name, 'constexpr') for name in kernel.arg_names
        }
        aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(kernel.arg_names)
                   if name in types or name in ('channels', 'pixels')}  # fmt: skip
        source = ASTSource(kernel, signature, constants, aligned)
        code = tmp_path / f'{kernel.__name__}.cubin'
        code.write_bytes(triton.compile(source, target=GPUTarget('cuda', arch, 32)).asm['cubin'])
        printed = subprocess.check_output([tool, '--dump-resource-usage', code], text=True)
        registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', printed).groups())
        print(f'sm_{arch}, {precision}, {rows} x {columns}, {kernel.__name__}: {registers}')
        assert stack == 0
