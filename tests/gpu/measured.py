"""What `everything.py` measures; each step returns what goes into its line."""

import copy
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import mmcv.ops
import mmdet.apis
import mmpretrain  # noqa: F401
import mmseg.apis  # noqa: F401
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from benchmarking.gpu import Case, Device, run
from benchmarking.plain_lska_van import PlainLSKAVAN, plain_lska_van
from lska_mm import LSKAVAN
from lska_mm.fast import gpu

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
SMALL = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], ffn_ratios=[8, 8, 4, 4])
ARCH = 'tiny' if GPU else SMALL
COMPILER = {} if GPU else dict(backend='aot_eager')
WARM_UP, TURNS = (4, 9) if GPU else (1, 1)
SECONDS = 160  # of the benchmark


def machine(out):
    """What there is, and whether mmcv's operators and the kernels work."""
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9]]), torch.tensor([0.9, 0.8])
    kept = mmcv.ops.nms(boxes.to(DEVICE), scores.to(DEVICE), 0.5)[1].tolist()
    known = dict(python=platform.python_version(), torch=torch.__version__, nms=kept)
    if GPU:
        works = gpu.kernels is not None and gpu.kernels.works(0)
        known.update(gpu=torch.cuda.get_device_name(), kernels=works, numbers=gpu.large(0))
    return known


def launches(out):
    """Microseconds that the host takes: an operator, a kernel of Triton, and training with it."""
    x = torch.rand(2, 32, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(32, 32, (1, 7), 1, (0, 9), 3, 32).to(DEVICE)
    small = torch.zeros(1, device=DEVICE)

    def train(function):
        function(x.requires_grad_()).sum().backward()

    calls = {'add': lambda: small.add_(1), 'torch': lambda: train(conv)}
    if GPU:
        ours = gpu.kernels.convolve
        calls['triton'] = lambda: train(lambda x: ours(x, conv.weight, conv.bias, 3))
        calls['triton, forward'] = lambda: ours(x.detach(), conv.weight, conv.bias, 3)
    found = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        found[name] = 1e4 * (time.perf_counter() - start)
    return found


def convolutions(out):
    """Milliseconds on the GPU: depth-wise convolutions of tiny, forward and backward."""
    steps, size = {}, (2, 32, 200, 304) if GPU else (1, 8, 16, 16)
    for channels, kernel, dilation in ((1, (1, 5), 1), (1, (7, 1), 3), (8, (3, 3), 1)):
        batch, width, *rest = size
        x = torch.rand(batch, channels * width, *rest, device=DEVICE)
        x = x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
        padding = [dilation * (n // 2) for n in kernel]
        conv = torch.nn.Conv2d(x.shape[1], x.shape[1], kernel, 1, padding, dilation, x.shape[1])
        conv.to(DEVICE, torch.bfloat16)
        ways = dict(torch=conv)
        if GPU:
            ways['triton'] = functools.partial(
                gpu.kernels.convolve, weight=conv.weight, bias=conv.bias, dilation=dilation
            )
        for name, way in ways.items():
            key, y = f'{name}, {kernel[0]} x {kernel[1]}, {x.shape[1]} channels', way(x)
            steps[f'{key}, forward'] = functools.partial(way, x)
            steps[f'{key}, backward'] = functools.partial(y.backward, torch.ones_like(y), True)
    return milliseconds(steps)


def block(out):
    """One block, compiled: fixed and varying sizes, differences from float64, kernels launched."""
    torch.manual_seed(0)
    model, found = LSKAVAN(ARCH).to(DEVICE).train().block2[0], {}
    exact = copy.deepcopy(model).double()
    for dynamic in (False, True):
        compiled = copy.deepcopy(model)
        compiled.compile(dynamic=dynamic, **COMPILER)
        for side in (24, 40) if dynamic else (24,):
            x = torch.rand(2, model.attn.proj_1.in_channels, side, side + 8, device=DEVICE)
            x = x.contiguous(memory_format=torch.channels_last)
            ours, other = (outputs(m, x.to(m.layer_scale_1.dtype)) for m in (compiled, exact))
            errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, other)]
            # gradients before a norm are zero but for rounding
            found[f'dynamic={dynamic}, {side}'] = [errors[0], statistics.median(errors)]
        if GPU:
            with torch.profiler.profile() as profile:
                outputs(compiled, x)
                torch.cuda.synchronize()
            names = [event.name for event in profile.events()
                     if event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
            own = [name for name in names if '_convolve' in name or '_differentiate' in name]
            found[f'dynamic={dynamic}, kernels'] = f'{len(names)}, {len(own)} of them ours'
    return found


def outputs(model, x):
    """The map of a module, and its gradients."""
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out, *(p.grad for p in model.parameters())]


def backbones(out):
    """The benchmark's rows for training and inference, eager, as CUDA graphs, and compiled."""
    shapes = [(2, (800, 1216)), (32, (224, 224))] if GPU else [(2, (64, 64))]
    cases = [
        Case(arch, 23, *shape, 'bf16', 'NCHW', train, compiled=True)
        for train in (True, False) for arch in ('tiny', 'base') for shape in shapes
    ]  # fmt: skip
    run(build, out, SECONDS, DEVICE, cases)
    rows = json.loads((out / 'benchmark.json').read_text())['rows']
    return {f'{row["arch"]} {row["batch"]} {"train" if row["train"] else "infer"} {row["model"]}':
            round(row['ratio'], 3) for row in rows}  # fmt: skip


def build(arch, kernel_size, train):
    """Models to compare."""
    if not GPU:
        return dict(plain=plain_network(), default=LSKAVAN(ARCH, kernel_size))
    return dict(plain=plain_lska_van(arch, kernel_size), default=LSKAVAN(arch, kernel_size))


def detectors(out):
    """Milliseconds of whole training steps in float16, two images of 800 x 1216."""
    found = {}
    for name in ('mask-rcnn', 'retinanet'):
        kinds = ('plain', 'default', 'compiled', 'resnet50')
        found |= milliseconds({f'{name} {kind}': training_step(name, kind) for kind in kinds})
    return found


def training_step(name, kind):
    """A function that trains a detector by one step."""
    from mmdet.testing import demo_mm_inputs

    path = Path(f'configs/detection/{name}_lska-van-tiny_fpn_1x_coco.py')
    if kind == 'resnet50':
        own = Path(mmdet.__file__).parent / '.mim/configs'
        path = own / name.replace('-', '_') / f'{name}_r50_fpn_1x_coco.py'
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    if kind != 'resnet50':
        indices = cfg.model.backbone.out_indices
        cfg.model.backbone.arch = ARCH
        cfg.model.neck.in_channels = [LSKAVAN(ARCH).arch['embed_dims'][i] for i in indices]
    model = MODELS.build(cfg.model)
    if kind == 'plain':
        model.backbone = PlainBackbone(indices)
    model.to(DEVICE).train()
    if kind == 'compiled':
        model.backbone.compile(dynamic=True, **COMPILER)
    how = dict(type='AmpOptimWrapper', loss_scale='dynamic') if GPU else {}
    optim_wrapper = build_optim_wrapper(model, {**cfg.optim_wrapper, **how})
    shape = (3, 800, 1216) if GPU else (3, 64, 96)
    data = demo_mm_inputs(2, [shape] * 2, num_items=[10, 10], with_mask=name == 'mask-rcnn')
    return lambda: model.train_step(data, optim_wrapper)


def plain_network():
    """The network in plain operators."""
    if GPU:
        return plain_lska_van(ARCH, 23)
    return PlainLSKAVAN(ARCH['embed_dims'], ARCH['depths'], 23)


class PlainBackbone(torch.nn.Module):
    """The same, of which a detector takes some maps."""

    def __init__(self, out_indices):
        super().__init__()
        self.network, self.out_indices = plain_network(), out_indices

    def forward(self, x):
        maps = self.network.features(x)
        return tuple(maps[i] for i in self.out_indices)


def milliseconds(steps):
    """The median time of each step, in turns, by the benchmark's clock."""
    device, times = Device(DEVICE), {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(TURNS):
        for name, step in steps.items():
            times[name].append(device.milliseconds(step))
    return {name: statistics.median(values) for name, values in times.items()}
