"""Norms and scales folded into convolutions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

import changes
from conftest import published, reference_error, reference_image, small, trained
from lska_mm.models.lska import ATTENTIONS
from lska_mm.weights.names import CheckpointError


@pytest.mark.parametrize(('arch', 'k'), [('tiny', 7), ('tiny', 23), ('small', 35)])
def test_deployed_gives_the_published_outputs(arch, k):
    backbone = published(arch, k)
    backbone.switch_to_deploy()
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    with torch.no_grad():
        difference = reference_error(backbone(reference_image()), arch, k)
    print(f'{arch} k={k} deployed: largest difference {difference:.1e}')
    assert difference <= 1e-5


def assert_deployed_is_the_same(backbone, image):
    """In double precision, to tell an error from rounding; a second time changes nothing."""
    backbone.double()
    with torch.no_grad():
        before = backbone(image.double())
        backbone.switch_to_deploy()
        state = copy.deepcopy(backbone.state_dict())
        backbone.switch_to_deploy()
        assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
        for out, expected in zip(backbone(image.double()), before):
            torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_deployed_equals_itself_before(attention):
    assert_deployed_is_the_same(trained(attention=attention), torch.rand(2, 3, 61, 83))


def test_deployed_state_dict_reloads():
    backbone = small().eval()
    backbone.switch_to_deploy()
    again = small(deploy=True)
    again.load_state_dict(backbone.state_dict())
    image = torch.rand(1, 3, 32, 32)
    for out, expected in zip(again(image), backbone(image)):
        assert torch.equal(out, expected)
    with pytest.raises(CheckpointError, match=r'are .* deploy=True\), this backbone is .*=3\): '):
        small().load_state_dict(backbone.state_dict())
    with pytest.raises(CheckpointError, match=r'this backbone is .* deploy=True\): .*with a tool'):
        again.load_state_dict(small().state_dict())


def test_deploying_in_training_mode_ends_in_evaluation():
    """MMDeploy calls it before `eval()`."""
    backbone, twin, image = small().train(), small().eval(), torch.rand(1, 3, 32, 32)
    backbone.switch_to_deploy()
    assert not any(module.training for module in backbone.modules())
    backbone.eval()
    with torch.no_grad():
        for out, expected in zip(backbone(image), twin(image)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# --- What can be folded, and what cannot --------------------------------------------------

PARTS = ('patch_embed1.proj', 'block1.0.attn.proj_1', 'block1.0.attn.proj_2', 'block1.1.mlp.fc1',
         'block2.0.mlp.fc2')  # fmt: skip
FIRST = r"call torch.nn.utils.{}\(module, 'weight'\) first"
HOOKS = 'it has 1 hooks, which would see other maps; remove them first'
CHANGES = {  # and what the error says
    changes.pruned: FIRST.format('prune.remove'),
    changes.parametrized: FIRST.format('parametrize.remove_parametrizations'),
    changes.weight_normed: FIRST.format('remove_weight_norm'),
    nn.utils.spectral_norm: FIRST.format('remove_spectral_norm'),
    changes.hooked: HOOKS,
    changes.hooked_before: HOOKS,
    changes.replaced_forward: 'its forward was replaced; restore it first',
    changes.of_a_subclass: 'it is a Subclass, not the original Conv2d',
    changes.Adapter: 'it is a Adapter, not the original Conv2d',
    changes.without_bias: 'it has no bias',
}


CELLS = [(change, name) for change in CHANGES for name in PARTS] + [
    (change, name)
    for change in (changes.hooked, changes.replaced_forward)
    for name in ('patch_embed2', 'block1.1.drop_path', 'block2.0.mlp')
]


@pytest.mark.parametrize(('change', 'name'), CELLS)
def test_a_changed_part_is_refused_and_nothing_changes(change, name):
    backbone, image = trained(), torch.rand(1, 3, 64, 64)
    changes.apply(change, backbone, name)
    message = f'^{name} cannot be folded: .*{CHANGES[change]}'
    with torch.no_grad():
        before = backbone(image)
        with pytest.raises(TypeError, match=message) as error:
            backbone.switch_to_deploy()
        assert len(str(error.value).splitlines()) == 1
        assert not backbone.deployed
        assert all(torch.equal(a, b) for a, b in zip(backbone(image), before))
        backbone.train()(image)  # as it was


def removed_pruning(conv):
    prune.l1_unstructured(conv, 'weight', 0.4)
    prune.remove(conv, 'weight')


def removed_weight_norm(conv):
    nn.utils.parametrizations.weight_norm(conv)
    parametrize.remove_parametrizations(conv, 'weight')


@pytest.mark.parametrize('change', [removed_pruning, removed_weight_norm])
def test_what_the_error_says_helps(change):
    backbone, image = trained(), torch.rand(1, 3, 64, 64)
    for name in PARTS:
        change(backbone.get_submodule(name))
    assert_deployed_is_the_same(backbone, image)


def frozen_batch_norm(backbone):
    ops = pytest.importorskip('torchvision.ops')
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = ops.FrozenBatchNorm2d(child.num_features, child.eps)
                state = child.state_dict()
                del state['num_batches_tracked']
                frozen.load_state_dict(state)
                setattr(module, name, frozen)


def fused_by_mmcv(backbone):
    from mmcv.cnn import fuse_conv_bn

    fuse_conv_bn(backbone)


def fused_by_torch(backbone):
    patch = backbone.patch_embed1
    patch.proj = nn.utils.fuse_conv_bn_eval(patch.proj, patch.norm)
    patch.norm = nn.Identity()


def some_norms_gone(backbone):
    backbone.block1[0].norm1 = nn.Identity()
    backbone.block2[0].norm2 = nn.Identity()


def in_training_mode(backbone):
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
    backbone(torch.rand(2, 3, 64, 64))
    backbone.eval()


@pytest.mark.parametrize('change', [
    frozen_batch_norm, fused_by_mmcv, fused_by_torch, some_norms_gone, in_training_mode,
])  # fmt: skip
def test_norms_that_can_be_folded(change):
    backbone = trained()
    change(backbone)
    assert_deployed_is_the_same(backbone, torch.rand(2, 3, 61, 83))


@pytest.mark.parametrize('norm_cfg', [
    dict(type='BN', affine=False), dict(type='SyncBN'), dict(type='BN', eps=0.1),
    dict(type='BN', track_running_stats=True, requires_grad=False),
])  # fmt: skip
def test_norms_of_configs_that_can_be_folded(norm_cfg):
    assert_deployed_is_the_same(trained(norm_cfg=norm_cfg), torch.rand(2, 3, 61, 83))


@pytest.mark.parametrize('norm_cfg', [
    dict(type='GN', num_groups=2), dict(type='IN'), dict(type='BN', track_running_stats=False),
    dict(type='mmpretrain.LN2d'),
])  # fmt: skip
def test_norms_that_cannot_be_folded_are_refused_and_nothing_changes(norm_cfg):
    pytest.importorskip('mmpretrain.models')
    backbone, image = trained(norm_cfg=norm_cfg), torch.rand(2, 3, 64, 64)
    before, expected = copy.deepcopy(backbone.state_dict()), backbone(image)
    message = 'patch_embed1.norm cannot be folded: it is .*, and only BatchNorm with running stat'
    with pytest.raises(TypeError, match=message):
        backbone.switch_to_deploy()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected))


def tied_block(backbone):
    backbone.block1[1] = backbone.block1[0]


def tied_branch(backbone):
    backbone.block1[1].mlp = backbone.block1[0].mlp


@pytest.mark.parametrize('tie', [tied_block, tied_branch])
def test_shared_modules_are_refused_and_nothing_changes(tie):
    """They cannot take two norms; folded twice they would be wrong in silence."""
    backbone, image = trained(), torch.rand(1, 3, 64, 64)
    tie(backbone)
    with torch.no_grad():
        before = backbone(image)
        match = r'^block1\.1(.*) cannot be folded: it is shared with block1\.0\1; copy it\.$'
        with pytest.raises(TypeError, match=match):
            backbone.switch_to_deploy()
        assert all(torch.equal(a, b) for a, b in zip(backbone(image), before))


def tied_parameter(backbone):
    backbone.block1[1].attn.proj_2.weight = backbone.block1[0].attn.proj_2.weight


def tied_memory(backbone):
    backbone.block1[1].mlp.fc1.weight.data = backbone.block1[0].mlp.fc1.weight.data


def expanded_bias(backbone):
    bias = backbone.block2[0].mlp.fc1.bias
    backbone.block2[0].mlp.fc1.bias = torch.nn.Parameter(bias.detach()[:1].expand(len(bias)))


@pytest.mark.parametrize('tie', [tied_parameter, tied_memory, expanded_bias])
def test_the_memory_of_weights_is_left_as_it_is(tie):
    """It may be that of other parameters, of a state dict, or of another process."""
    backbone, image = trained(), torch.rand(1, 3, 64, 64)
    tie(backbone)
    twin, state = small().eval(), backbone.state_dict()
    with torch.no_grad():
        before = backbone(image)
        backbone.switch_to_deploy()
        twin.load_state_dict(state)
        for outs in (backbone(image), twin(image)):
            for out, expected in zip(outs, before):
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_stays_frozen():
    backbone = trained().requires_grad_(False)
    backbone.switch_to_deploy()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    torch.nn.Sequential(backbone).train()  # a teacher in a model that trains


def test_shared_gates_are_folded_around():
    backbone = trained()
    gates = [block.attn for block in backbone.block1]
    gates[1].spatial_gating_unit = gates[0].spatial_gating_unit
    assert_deployed_is_the_same(backbone, torch.rand(1, 3, 64, 64))


def test_a_stock_tool_that_fuses_afterwards_finds_nothing():
    from mmcv.cnn import fuse_conv_bn

    backbone, image = trained(), torch.rand(1, 3, 64, 64)
    backbone.switch_to_deploy()
    with torch.no_grad():
        expected = backbone(image)
        assert all(torch.equal(a, b) for a, b in zip(fuse_conv_bn(backbone)(image), expected))
