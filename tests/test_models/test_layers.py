"""The fast ways to compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import published, reference_error, reference_image, small
from lska_mm.models import eager, layers
from lska_mm.models.layers import DepthwiseConv2d, PointwiseConv2d, conv_of_gelu


def test_every_way_to_compute_gives_the_published_outputs():
    """With and without gradients, without oneDNN, traced, deployed and traced."""
    backbone, image = published(), reference_image()
    assert reference_error(backbone(image)) <= 1e-5
    for deploy in (False, True):
        with torch.no_grad():
            if deploy:
                backbone.switch_to_deploy()
            traced = torch.jit.trace(backbone, image, check_trace=False)
            assert reference_error(traced(image)) <= 1e-5
            with torch.backends.mkldnn.flags(enabled=False):
                assert reference_error(backbone(image)) <= 1e-5


@pytest.mark.parametrize(
    ('cached', 'few'),
    [(2**20, 0), (64, 0), (64, 10**6)],
    ids=['whole', 'in parts', 'products of matrices'],
)
@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='GN', num_groups=2)])
def test_inference_equals_the_forward_pass_of_training(norm_cfg, cached, few, monkeypatch):
    """With the MLP's wide map computed whole and some channels at a time."""
    monkeypatch.setattr(layers, 'CACHED', cached)
    monkeypatch.setattr(eager, 'FEW', few)
    arch = dict(embed_dims=[16, 32], depths=[2, 1], ffn_ratios=[8, 5])
    backbone = small(arch=arch, norm_cfg=norm_cfg).eval()
    for name, parameter in backbone.named_parameters():
        if 'layer_scale' in name:
            nn.init.uniform_(parameter, 0.5, 1)
    image = torch.rand(2, 3, 61, 83)
    expected = backbone(image)
    for _ in range(2 if norm_cfg['type'] == 'BN' else 1):
        with torch.no_grad():
            for out, before in zip(backbone(image), expected):
                torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-4)
            if norm_cfg['type'] == 'BN':
                backbone.switch_to_deploy()


@pytest.mark.parametrize('shape', [(2, 6, 5, 29), (1, 6, 7, 1), (3, 6, 12, 9)])
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('kernel', [(1, 7), (7, 1), (3, 3)])
def test_depthwise_convolution_equals_the_plain_one(kernel, dilation, shape):
    """Outputs, gradients, and gradients of gradients."""
    conv = DepthwiseConv2d(6, kernel, dilation).double()
    x = torch.rand(shape, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = functional.conv2d(x, conv.weight, conv.bias, 1, conv.padding, dilation, 6)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain)
    results = []
    for out in (conv(x), plain):
        torch.testing.assert_close(out, plain)
        inputs = [x, conv.weight, conv.bias]
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(grads[0].square().sum(), inputs)
        results.append([*grads, *second])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_frozen_weights_get_no_gradient():
    conv = DepthwiseConv2d(6, (7, 1), 3).requires_grad_(False)
    x = torch.rand(2, 6, 9, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None


@pytest.mark.parametrize('side', [5, 40])  # a product of matrices, and a convolution
@pytest.mark.parametrize('scaled', [False, True])
def test_convolution_of_gelu_equals_the_plain_one(side, scaled):
    """Outputs, gradients, and gradients of gradients; what is frozen gets none."""
    conv = PointwiseConv2d(6, 4).double()
    x, scale = torch.randn(2, 6, side, side, dtype=torch.float64), torch.rand(4).double()
    inputs = [x.contiguous(memory_format=torch.channels_last), *conv.parameters(), scale]
    inputs = [t.requires_grad_() for t in (inputs if scaled else inputs[:-1])]
    found = conv_of_gelu(conv, *inputs[:1], *inputs[3:])
    plain = functional.conv2d(functional.gelu(inputs[0]), *inputs[1:3])
    if scaled:
        plain = plain * scale[:, None, None]
    results = []
    for out in (found, plain):
        torch.testing.assert_close(out, plain)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(grads[0].square().sum(), inputs)
        results.append([*grads, *second])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    conv.requires_grad_(False)
    for given in ([], [scale] if scaled else []):
        conv_of_gelu(conv, inputs[0], *given).sum().backward()
    assert conv.weight.grad is conv.bias.grad is None
    assert not scaled or scale.grad is not None


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])  # the second by a hook, say
def test_convolution_of_gelu_under_autocast(dtype):
    conv, x = PointwiseConv2d(6, 4), torch.randn(2, 6, 40, 40)
    expected = conv(functional.gelu(x))
    expected.square().sum().backward()
    wanted, conv.weight.grad = conv.weight.grad, None
    with torch.autocast('cpu', torch.bfloat16):
        found = conv_of_gelu(conv, x.to(dtype))
        other = conv(x)  # with the weights that autocast has kept
    assert other.requires_grad
    found.float().square().sum().backward()
    assert (found.dtype, conv.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(conv.weight.grad, wanted, rtol=0.05, atol=0.05 * wanted.max())
    conv.weight.grad = None
    other.float().sum().backward()
    assert conv.weight.grad is not None
