"""Norms and scales folded into convolutions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from conftest import published, reference_error, reference_image, small
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


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_deployed_equals_itself_before(attention):
    backbone = small(attention=attention)
    for module in backbone.modules():  # statistics and scales as after a training
        if isinstance(module, _BatchNorm):
            for values in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(values)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for name, parameter in backbone.named_parameters():
        if 'layer_scale' in name:
            nn.init.normal_(parameter)
    backbone.double()  # to tell an error from rounding
    image = torch.rand(2, 3, 61, 83).double()
    with torch.no_grad():
        before = backbone.eval()(image)
        backbone.switch_to_deploy()
        state = copy.deepcopy(backbone.state_dict())
        backbone.switch_to_deploy()  # a second time changes nothing
        assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
        for out, expected in zip(backbone(image), before):
            torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


def test_deployed_state_dict_reloads():
    backbone = small().eval()
    backbone.switch_to_deploy()
    again = small(deploy=True)
    again.load_state_dict(backbone.state_dict())
    image = torch.rand(1, 3, 32, 32)
    for out, expected in zip(again(image), backbone(image)):
        assert torch.equal(out, expected)
    with pytest.raises(CheckpointError, match=r'are deployed, .* set model.backbone.deploy=True'):
        small().load_state_dict(backbone.state_dict())
    with pytest.raises(CheckpointError, match='This backbone is deployed and the weights are not'):
        again.load_state_dict(small().state_dict())


def test_packed_weights_follow_the_parameters():
    """After load_state_dict, in a copy and in a pickle."""
    backbone, image = small(deploy=True), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = backbone(image)[1]  # packs
        for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            twin = clone(backbone)
            assert torch.equal(twin(image)[1], before)
            twin.load_state_dict({k: v + 0.1 for k, v in twin.state_dict().items()})
            fresh = small(deploy=True)
            fresh.load_state_dict(twin.state_dict())
            assert torch.equal(twin(image)[1], fresh(image)[1])
            assert not torch.equal(twin(image)[1], before)
            assert torch.equal(backbone(image)[1], before)


def test_weights_are_packed_for_the_size_of_the_maps():
    """What suits large maps is up to twice as slow on small ones, and the other way round."""
    backbone = small(deploy=True)

    def packed(side):
        with torch.no_grad():
            backbone(torch.rand(1, 3, side, side))
        return backbone.block1[0].mlp.fc1._packed[1]

    first = packed(96)
    assert packed(98) is first
    assert packed(288) is not first


def test_deploying_in_training_mode_ends_in_evaluation():
    """MMDeploy calls it before `eval()`."""
    backbone, twin, image = small().train(), small().eval(), torch.rand(1, 3, 32, 32)
    backbone.switch_to_deploy()
    assert not any(module.training for module in backbone.modules())
    backbone.eval()
    with torch.no_grad():
        for out, expected in zip(backbone(image), twin(image)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='has no norms left to train: build it without deploy'):
        torch.nn.Sequential(backbone).train()


def test_deploying_other_norms_is_refused_and_changes_nothing():
    backbone = small(norm_cfg=dict(type='GN', num_groups=2)).eval()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(TypeError, match='Only BatchNorm can be part of a convolution, not GroupN'):
        backbone.switch_to_deploy()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
