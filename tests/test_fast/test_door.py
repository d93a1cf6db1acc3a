"""What people do to a built backbone counts, whatever is computed faster.

A changed backbone must give what a copy in double precision gives, which only the plain
operators compute.
"""

import pytest
import torch
from torch import nn

from changes import (
    Adapter,
    apply,
    hooked,
    hooked_before,
    of_a_subclass,
    parametrized,
    pruned,
    replaced_forward,
    weight_normed,
    without_bias,
)
from conftest import assert_same, small, trained
from lska_mm import LSKA, LSKANeck
from lska_mm.fast import door
from lska_mm.models.lska import ATTENTIONS

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
# A convolution of each kind.
GATE = 'attn.spatial_gating_unit.conv0h'
CONVOLUTIONS = ('attn.proj_1', GATE, 'attn.proj_2', 'mlp.fc1', 'mlp.dwconv', 'mlp.fc2')


# --- What is done to a convolution ------------------------------------------------------


def replaced_conv_forward(conv):
    own = type(conv)._conv_forward
    conv._conv_forward = lambda x, weight, bias: 2 * own(conv, x, weight, bias)


def circular(conv):
    if any(conv.padding):
        conv.padding_mode = 'circular'
        conv._reversed_padding_repeated_twice = [
            side for side in reversed(conv.padding) for _ in range(2)
        ]


def with_other_weight(conv):
    conv.weight = nn.Parameter(conv.weight.detach().flip(0).clone())


def changed_by_data(conv):
    conv.weight.data.mul_(2)


def in_other_strides(conv):
    conv.weight = nn.Parameter(conv.weight.detach().transpose(0, 1).clone().transpose(0, 1))


def with_strided_bias(conv):
    conv.bias = nn.Parameter(torch.stack([conv.bias.detach(), 0 * conv.bias], 1)[:, 0])


CHANGES = (
    hooked, hooked_before, replaced_forward, replaced_conv_forward, pruned, parametrized,
    weight_normed, circular, without_bias, Adapter, of_a_subclass, with_other_weight,
    changed_by_data, in_other_strides, with_strided_bias,
)  # fmt: skip


# --- And to more of a block -------------------------------------------------------------


def dilated(block):
    conv = block.get_submodule(GATE)
    height, width = conv.kernel_size
    conv.dilation, conv.padding = (2, 2), (2 * (height // 2), 2 * (width // 2))


def dilated_unevenly(block):
    block.mlp.dwconv.dilation, block.mlp.dwconv.padding = (2, 1), (2, 1)


def in_groups(block):
    conv = block.attn.proj_1
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight.detach()[:, : conv.in_channels // 2])


def with_another_activation(block):
    block.attn.activation, block.mlp.act = nn.ReLU(), nn.ReLU()


def with_approximate_gelu(block):
    block.attn.activation.approximate = block.mlp.act.approximate = 'tanh'


def with_a_wider_kernel(block):
    conv = block.mlp.dwconv
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight.detach(), [1] * 4, value=0.1))
    conv.kernel_size, conv.padding = (5, 5), (2, 2)


def with_a_longer_far_kernel(block):
    """Whose module still has the size that it was built with."""
    conv = block.attn.spatial_gating_unit.conv_spatial_h
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight.detach(), [1, 1], value=0.1))
    conv.padding = (0, conv.padding[1] + conv.dilation[1])


def with_a_longer_gate(block):
    block.attn.spatial_gating_unit.append(nn.Sigmoid())


def with_another_gate(block):
    block.attn.spatial_gating_unit = nn.Hardswish()


def with_wrapped_branches(block):
    block.attn, block.mlp = Adapter(block.attn), Adapter(block.mlp)


def with_hooked_branches(block):
    for part in (block.attn, block.attn.spatial_gating_unit, block.mlp):
        hooked(part)


def compiled_in_place(block):
    block.attn.compile(backend='eager')


def with_frozen_weights(block):
    block.requires_grad_(False)


def with_hooks_of_gradients(block):
    for name in CONVOLUTIONS:
        conv = block.get_submodule(name)
        conv.register_full_backward_hook(lambda module, *gradients: None)
        conv.register_full_backward_pre_hook(lambda module, gradient: None)


THINGS = {
    change.__name__: change
    for change in (
        dilated, dilated_unevenly, in_groups, with_another_activation, with_approximate_gelu,
        with_a_wider_kernel, with_a_longer_far_kernel, with_a_longer_gate, with_another_gate,
        with_wrapped_branches, with_hooked_branches, compiled_in_place, with_frozen_weights,
        with_hooks_of_gradients,
    )
}  # fmt: skip
THINGS.update(
    {
        f'{change.__name__} {name}': lambda block, change=change, name=name: apply(
            change, block, name
        )
        for change in CHANGES
        for name in CONVOLUTIONS
    }
)
# Of these, a convolution of each branch for each change, another from change to change.
SHORT = {
    f'{change.__name__} {CONVOLUTIONS[j + i % 3]}'
    for i, change in enumerate(CHANGES)
    for j in (0, 3)
}
# Through .data PyTorch counts no version; a deployed block calls the parts of its branches.
CELLS = [
    pytest.param(thing, deploy, marks=[pytest.mark.soak] * (' ' in thing and thing not in SHORT))
    for thing in THINGS
    for deploy in (False, True)
    if not (deploy and thing.startswith(('changed_by_data', 'with_wrapped_branches')))
]
UNCHANGED = ('with_frozen_w', 'with_hooks_of', 'in_other_strides', 'compiled', 'circular',
             'with_strided_bias')  # fmt: skip


def outputs(thing, deploy, dtype):
    """What a backbone makes of an image with and without gradients, and what it made before."""
    model, image = trained().to(dtype), IMAGE.to(dtype)
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad():
        before = model(image)  # packs weights
    THINGS[thing](model.block1[0])
    outs = [before]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outs.append([out.detach() for out in model(image)])
    return outs


@pytest.mark.parametrize(('thing', 'deploy'), CELLS)
def test_what_is_done_to_a_part_counts(thing, deploy):
    before, *found = outputs(thing, deploy, torch.float32)
    _, expected, _ = outputs(thing, deploy, torch.float64)  # by plain operators
    for outs in found:
        assert_same(outs, expected)
    if not thing.startswith(UNCHANGED):
        assert (found[0][1] - before[1]).abs().max() > 1e-3


# --- What passes the door ---------------------------------------------------------------


def test_nothing_is_done_and_the_fast_way_is_taken():
    """Otherwise the tests above could not fail."""
    model = trained()
    block, x = model.block1[0], IMAGE.repeat(1, 3, 1, 1)[:, :8]
    parts = [block.attn, block.mlp, LSKA(8), LSKANeck(8, 1).blocks[0]]
    assert all(door.fast_path(part, x) for part in parts)
    assert not door.fast_path(block, x)
    with torch.no_grad():
        assert all(door.fast_path(part, x) for part in parts)
        model.switch_to_deploy()
        assert door.fast_path(model.block1[0], x)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_an_empty_batch(attention, grad):
    gate = LSKA(16, 11, attention)
    for module, shape in ((gate, (16, 14, 14)), (small(attention=attention), (3, 32, 32))):
        module.train(module is gate)  # a BatchNorm in training takes none
        x = torch.zeros(0, *shape, requires_grad=True)
        with torch.set_grad_enabled(grad):
            out = module(x)
            out = out[-1] if isinstance(out, tuple) else out
        assert out.shape[0] == 0
        if grad:
            out.sum().backward()
            assert x.grad.shape == x.shape
    deployed = small(attention=attention, deploy=True)
    assert deployed(torch.zeros(0, 3, 32, 32))[1].shape == (0, 16, 4, 4)
