"""Packed weights of a deployed backbone on a CPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

from conftest import assert_same, small, trained

IMAGE = torch.rand(2, 3, 61, 83, generator=torch.Generator().manual_seed(0))


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


# --- Other weights, after which all is computed with them ---------------------------------


def as_a_member(backbone, state):
    """Of an ensemble by `functional_call`, whose members' memory is given to the next."""
    copies = {key: value.clone() for key, value in state.items()}
    return torch.func.functional_call(backbone, copies, (IMAGE,))


def reloaded(backbone, state):
    backbone.load_state_dict(state)


def assigned(backbone, state):
    backbone.load_state_dict(state, assign=True)


def swapped(backbone, state):
    """Other memory behind the same parameters, as some trainers swap averaged weights in."""
    for name, parameter in backbone.named_parameters():
        parameter.data = state[name].clone()


def of_other_precision(backbone, state):
    backbone.load_state_dict(state)
    backbone(IMAGE)
    backbone.double().float()


def replaced(backbone, state):
    for name, _ in list(backbone.named_parameters()):
        path, _, last = name.rpartition('.')
        setattr(backbone.get_submodule(path), last, nn.Parameter(state[name].clone()))


def exchanged(backbone, state):
    """By `torch.utils.swap_tensors`, which refuses tensors that others refer to weakly."""
    for name, parameter in backbone.named_parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(state[name].clone()))


def stepped(backbone, state):
    """By an optimizer."""
    for name, parameter in backbone.named_parameters():
        parameter.grad = parameter.detach() - state[name]
    torch.optim.SGD(backbone.parameters(), lr=1.0).step()


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    'change',
    [as_a_member, reloaded, assigned, swapped, of_other_precision, replaced, stepped]
    + [exchanged] * hasattr(torch.utils, 'swap_tensors'),  # not in torch 2.1
)
def test_packed_weights_never_outlive_their_weights(change, mode):
    with torch.no_grad():
        expected = [deployed(seed)(IMAGE) for seed in range(4)]
    for built_in_mode in (False, True):
        with mode() if built_in_mode else torch.no_grad():
            backbone = deployed()
        with mode():
            for seed in range(4):
                found = change(backbone, deployed(seed).state_dict())
                assert_same(found or backbone(IMAGE), expected[seed])


def test_copies_are_independent_and_pack_for_themselves():
    plain = small().eval()
    assert_same(pickle.loads(pickle.dumps(plain))(IMAGE), plain(IMAGE))
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
