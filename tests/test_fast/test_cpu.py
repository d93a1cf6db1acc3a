"""The ways to compute on a CPU, and their gradients."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import (
    assert_same,
    load_tool,
    published,
    published_state,
    reference_error,
    reference_image,
    trained,
)
from lska_mm.fast import cpu, door, gradients
from lska_mm.models.block import Block
from lska_mm.models.deploy import FusedBlock, affine
from lska_mm.models.lska import ATTENTIONS, depthwise_conv

LAST = torch.channels_last
IMAGE = torch.rand(2, 3, 61, 83, generator=torch.Generator().manual_seed(0))


def plain(backbone, image):
    """What a copy in double precision gives, which the door leaves to the plain operators."""
    twin = copy.deepcopy(backbone).double()
    assert not door.fast_path(twin.block1[0].attn, image.double())
    return twin(image.double())


# --- Parity -----------------------------------------------------------------------------


@pytest.mark.parametrize('layout', [torch.contiguous_format, LAST])
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('deploy', [False, True])
def test_every_way_gives_the_published_outputs(deploy, grad, layout):
    """As it is, traced, and without oneDNN."""
    backbone, image = published(), reference_image().contiguous(memory_format=layout)
    if deploy:
        backbone.switch_to_deploy()
    with torch.set_grad_enabled(grad):
        errors = dict(itself=backbone(image), traced=torch.jit.trace(backbone, image)(image))
        with torch.backends.mkldnn.flags(enabled=False):
            errors['without oneDNN'] = backbone(image)
    errors = {name: reference_error(outs) for name, outs in errors.items()}
    print(f'{deploy=} {grad=} {layout}', *(f'{name} {e:.1e}' for name, e in errors.items()))
    assert max(errors.values()) <= 1e-5


def test_gradients_are_those_of_the_plain_implementation():
    """Of each parameter, in double precision there."""
    tool = load_tool('.dev_scripts/benchmarking/plain_lska_van.py')
    expected = tool.plain_lska_van('tiny', 23).double().eval()
    expected.load_state_dict({key: value.double() for key, value in published_state().items()})
    backbone, image, found = published(out_indices=(0, 1, 2, 3)), reference_image(), []
    for forward, model in ((backbone, backbone), (expected.features, expected)):
        outs = forward(image.to(next(model.parameters()).dtype))
        sum(out.square().mean() for out in outs).backward()
        found.append(
            {
                name.replace('dwconv.dwconv', 'dwconv'): p.grad.double()
                for name, p in model.named_parameters()
                if not name.startswith('head')
            }
        )
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    worst = max(((ours[name] - g).abs().max() / max(g.abs().max(), 1e-3 * largest)).item()
                for name, g in theirs.items())  # fmt: skip
    print(f'{len(ours)} gradients, largest difference {worst:.1e} of the largest of a tensor')
    assert worst < 1e-3


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('cached', [2**20, 64], ids=['whole', 'in parts'])
def test_ways_of_inference(attention, cached, monkeypatch):
    """With the MLP's wide map computed whole and some channels at a time."""
    monkeypatch.setattr(cpu, 'CACHED', cached)
    arch = dict(embed_dims=[16, 32], depths=[2, 1], ffn_ratios=[8, 5])
    backbone = trained(arch=arch, attention=attention)
    with torch.no_grad():
        expected = plain(backbone, IMAGE)
        assert_same(backbone(IMAGE), expected)
        backbone.switch_to_deploy()
        assert_same(backbone(IMAGE), expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, LAST])
@pytest.mark.parametrize('channels', [1, 2, 8])
def test_maps_of_any_size(channels, layout):
    """Also where a dimension is 1, so that their layout is ambiguous."""
    block = Block(channels, 11, 'LSKA', 4, 0.0, 0.0, dict(type='BN'), False).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    parts = [block.attn, block.attn.spatial_gating_unit, block.mlp]
    norms = [affine('norm', norm, block.layer_scale_1) for norm in (block.norm1, block.norm2)]
    parts.append(FusedBlock(copy.deepcopy(block), *norms))
    for size in itertools.product((1, 2), (1, 2, 5), (1, 2, 5)):
        x = torch.rand(size[0], channels, *size[1:]).contiguous(memory_format=layout)
        for part in parts:
            expected = copy.deepcopy(part).double()(x.double())
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    out = (door.fast_path(part, x) or part)(x)
                assert_same([out], [expected])
                assert out.is_contiguous(memory_format=layout)


# --- Gradients --------------------------------------------------------------------------


def gradients_of(out, inputs):
    """First ones, and second ones."""
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(first[0].square().sum(), inputs)]


@pytest.mark.parametrize('shape', [(2, 6, 5, 29), (1, 6, 7, 1), (3, 6, 12, 9)])
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('kernel', [(1, 7), (7, 1), (3, 3)])
def test_depthwise_convolution(kernel, dilation, shape):
    conv = depthwise_conv(6, kernel, dilation).double()
    x = torch.rand(shape, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    found, inputs = gradients.depthwise(conv, x), [x, *conv.parameters()]
    torch.testing.assert_close(found, conv(x))
    for ours, theirs in zip(gradients_of(found, inputs), gradients_of(conv(x), inputs)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('as_product', [False, True])
def test_convolution_of_gelu(as_product):
    conv = nn.Conv2d(6, 4, 1).double()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64).contiguous(memory_format=LAST)
    inputs = [x.requires_grad_(), *conv.parameters()]
    found = gradients.conv_of_gelu(conv, x, as_product)
    expected = conv(functional.gelu(x))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients_of(found, inputs), gradients_of(expected, inputs)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('frozen', ['weight', 'bias', ''])
def test_what_is_frozen_gets_no_gradient(frozen):
    """One of a convolution's two, or both."""
    backbone = trained()
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    image = IMAGE.clone().requires_grad_()
    backbone(image)[1].square().sum().backward()
    twin = copy.deepcopy(backbone).double()
    twin.zero_grad()
    other = IMAGE.double().requires_grad_()
    twin(other)[1].square().sum().backward()
    assert_same([image.grad], [other.grad], 1e-3)
    for (name, ours), theirs in zip(backbone.named_parameters(), twin.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name


def test_a_backward_pass_under_autocast():
    """Of a forward pass without: autocast does not change gradients of PyTorch's operators."""
    found = []
    for amp in (False, True):
        backbone, image = trained(), IMAGE.clone().requires_grad_()
        loss = backbone(image)[1].square().sum()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            loss.backward()
        found.append([image.grad, *(p.grad for p in backbone.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])  # the second by a hook, say
def test_convolution_of_gelu_under_autocast(dtype):
    """As on a GPU, where it is computed so; and autocast's weights stay of use for others."""
    conv, x = nn.Conv2d(6, 4, 1), torch.randn(2, 6, 40, 40)
    expected = conv(functional.gelu(x))
    expected.square().sum().backward()
    wanted, conv.weight.grad = conv.weight.grad, None
    with torch.autocast('cpu', torch.bfloat16):
        found = gradients.conv_of_gelu(conv, x.to(dtype))
        other = conv(x)  # with the weights that autocast has kept
    assert other.requires_grad
    found.float().square().sum().backward()
    assert (found.dtype, conv.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(conv.weight.grad, wanted, rtol=0.05, atol=0.05 * wanted.max())
    conv.weight.grad = None
    other.float().sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, LAST])
@pytest.mark.parametrize('in_channels', [1, 3])
def test_gradients_have_the_strides_of_their_weights(in_channels, layout, amp):
    """DistributedDataParallel warns of others, and copies them."""
    backbone = trained(in_channels=in_channels).to(memory_format=layout).train()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        outs = backbone(IMAGE[:, :in_channels])
    sum(out.float().square().mean() for out in outs).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad.stride() != p.stride()]
