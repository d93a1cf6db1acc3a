"""The ways to compute on a CPU, and their gradients."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import (
    load_tool,
    published,
    published_state,
    reference_error,
    reference_image,
    small,
    trained,
)
from lska_mm.fast import cpu, door, gradients
from lska_mm.models.block import Block
from lska_mm.models.deploy import FusedBlock, affine
from lska_mm.models.lska import ATTENTIONS, depthwise_conv

LAST = torch.channels_last
IMAGE = torch.rand(2, 3, 61, 83, generator=torch.Generator().manual_seed(0))


def assert_same(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().float(), other.detach().float()
        torch.testing.assert_close(one, other, rtol=tolerance,
                                   atol=tolerance * other.abs().max().item())  # fmt: skip


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


# --- Packed weights of a deployed backbone ------------------------------------------------


def deployed(seed=0):
    backbone = trained()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    backbone.switch_to_deploy()
    return backbone


def packed(backbone):
    return [block.__dict__.get('_packed', {}) for block in backbone.block1]


def test_weights_are_packed():
    backbone = deployed()
    with torch.no_grad():
        backbone(IMAGE)
    assert all(len(weights) == 10 for weights in packed(backbone))


def members(backbone):
    """An ensemble by `functional_call`, whose members' memory is given to the next."""
    for seed in range(4):
        state = {key: v.clone() for key, v in deployed(seed).state_dict().items()}
        yield seed, torch.func.functional_call(backbone, state, (IMAGE,))
        del state


def reloaded(backbone):
    for seed in range(4):
        backbone.load_state_dict(deployed(seed).state_dict())
        yield seed, backbone(IMAGE)


def assigned(backbone):
    for seed in range(4):
        backbone.load_state_dict(deployed(seed).state_dict(), assign=True)
        yield seed, backbone(IMAGE)


def swapped(backbone):
    """Other memory behind the same parameters, as some trainers swap averaged weights in."""
    for seed in range(4):
        state = deployed(seed).state_dict()
        for name, parameter in backbone.named_parameters():
            parameter.data = state[name].clone()
        yield seed, backbone(IMAGE)


def of_other_precision(backbone):
    for seed in range(4):
        backbone.load_state_dict(deployed(seed).state_dict())
        backbone(IMAGE)
        backbone.double().float()
        yield seed, backbone(IMAGE)


def replaced(backbone):
    for seed in range(4):
        state = deployed(seed).state_dict()
        for name, _ in list(backbone.named_parameters()):
            path, _, last = name.rpartition('.')
            setattr(backbone.get_submodule(path), last, nn.Parameter(state[name].clone()))
        yield seed, backbone(IMAGE)


def exchanged(backbone):
    """By `torch.utils.swap_tensors`, which refuses tensors that others refer to weakly."""
    for seed in range(4):
        state = deployed(seed).state_dict()
        for name, parameter in backbone.named_parameters():
            torch.utils.swap_tensors(parameter, nn.Parameter(state[name].clone()))
        yield seed, backbone(IMAGE)


def stepped(backbone):
    """By an optimizer."""
    for seed in range(4):
        target = deployed(seed)
        for ours, theirs in zip(backbone.parameters(), target.parameters()):
            ours.grad = ours.detach() - theirs.detach()
        torch.optim.SGD(backbone.parameters(), lr=1.0).step()
        yield seed, backbone(IMAGE)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    'change',
    [members, reloaded, assigned, swapped, of_other_precision, replaced, stepped]
    + [exchanged] * hasattr(torch.utils, 'swap_tensors'),  # not in torch 2.1
)
def test_packed_weights_never_outlive_their_weights(change, mode):
    with torch.no_grad():
        expected = {seed: deployed(seed)(IMAGE) for seed in range(4)}
    for built_in_mode in (False, True):
        with mode() if built_in_mode else torch.no_grad():
            backbone = deployed()
        with mode():
            for seed, found in change(backbone):
                assert_same(found, expected[seed])


def test_copies_pack_for_themselves():
    backbone = deployed()
    with torch.no_grad():
        before = backbone(IMAGE)
        for clone in (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))):
            twin = clone(backbone)
            if clone is not copy.copy:  # which shares everything
                assert not any(packed(twin))
                twin.load_state_dict(deployed(1).state_dict())
                assert_same(twin(IMAGE), deployed(1)(IMAGE))
            assert all(torch.equal(a, b) for a, b in zip(backbone(IMAGE), before))
    assert not any('_packed' in key for key in backbone.state_dict())


def test_weights_are_packed_for_the_size_of_the_maps():
    """What suits large maps is up to twice as slow on small ones, and the other way round."""
    backbone = small(deploy=True)

    def weight(side):
        with torch.no_grad():
            backbone(torch.rand(1, 3, side, side))
        return packed(backbone)[0][id(backbone.block1[0].mlp.fc1)][2]

    first = weight(96)
    assert weight(98) is first
    assert weight(288) is not first
