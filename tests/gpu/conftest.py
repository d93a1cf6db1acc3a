"""What the checks of `make gpu` share; `make test` runs a case of each on a CPU, smaller."""

import copy
import json
from pathlib import Path

import pytest
import torch

from conftest import trained


def pytest_configure(config):
    if config.getoption('markexpr') == 'gpu' and not torch.cuda.is_available():
        pytest.exit('make gpu needs a GPU, torch sees none; make test has its checks on a CPU', 1)


def pytest_collection_modifyitems(items):
    """On a CPU one case of each test runs, so that none breaks before it meets a GPU."""
    seen = set()
    for item in items:
        device = getattr(item, 'callspec', None) and item.callspec.params.get('device')
        if device == 'cpu' and item.path.parent == Path(__file__).parent:
            if item.function in seen:
                item.add_marker(pytest.mark.soak)
            seen.add(item.function)


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    """A device, with all digits of float32."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    yield torch.device(request.param)
    for part, value in zip(parts, before):
        part.allow_tf32 = value


@pytest.fixture
def build(device):
    """Build a backbone with random biases, norms and scales, on a CPU: tiny, or smaller there."""
    size = dict(arch='tiny', out_indices=(0, 1, 2, 3)) if device.type == 'cuda' else {}
    return lambda **kwargs: trained(**size, **kwargs)


@pytest.fixture
def images(device):
    """Two images on a CPU; in channels_last, for which a GPU has kernels of its own."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, *((96, 96) if device.type == 'cuda' else (32, 32)))
    return images.contiguous(memory_format=torch.channels_last)


def on(device, model):
    """A copy of a model on a device."""
    return copy.deepcopy(model).to(device)


def gradients(model, images, seed=0, dtype=None):
    """The gradient of each parameter, on the CPU, from weights that tell all outputs apart."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = model(images)
    total = sum((out.float() * wave(out)).mean() for out in outs)
    total.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters()}


def wave(x):
    """Weights of the shape of ``x`` around 0, the same on any device."""
    return torch.arange(x.numel(), device=x.device).reshape(x.shape).mul(0.7).sin()


def assert_close(found, expected, tolerance):
    """Compare outputs, relative to the largest of each."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().cpu().float(), other.detach().cpu().float()
        assert one.isfinite().all()
        error = (one - other).abs().max() / other.abs().max()
        assert error <= tolerance


def assert_close_gradients(found, expected, tolerance):
    """Compare gradients, relative to the largest of the same kind of parameter.

    Those that are zero but for rounding (of biases before a norm) have no scale of their own.
    """
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max(), 0.01 * largest)
        error = (found[name] - gradient).abs().max() / scale
        assert error <= tolerance, f'{name}: {error:.2g}'


def last_metric(work_dir, name):
    """The last value in MMEngine's log."""
    [path] = work_dir.glob('*/vis_data/scalars.json')
    values = [json.loads(line) for line in path.read_text().splitlines()]
    return [line[name] for line in values if name in line][-1]


def take_training(cfg, demo):
    """Let a config train from random weights on the data, and as long, as a config of the demo."""
    parts = ('dataloader', 'evaluator', 'optim_wrapper', 'scheduler', 'train_cfg', 'hooks')
    for key in filter(lambda key: key.endswith(parts), demo):
        cfg[key] = demo[key]
    cfg.model.backbone.init_cfg = None
