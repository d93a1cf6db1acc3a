"""Norms after each stage: of the last axis, or of maps; and what is done to them."""

import copy

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.utils import parametrize

from conftest import trained

# The first stage's map is 8 pixels wide, as many as it has channels.
IMAGE = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))


class Wrapper(nn.Module):
    """Takes a module's place, as peft's `ModulesToSaveWrapper` does."""

    def __init__(self, norm):
        super().__init__()
        self.original_module, self.modules_to_save = norm, nn.ModuleDict(dict(default=norm))

    def forward(self, x):
        return self.modules_to_save['default'](x)


class Subclass(nn.LayerNorm):
    pass


class Same(nn.Module):
    def forward(self, weight):
        return weight + 0


def of_a_subclass(norm):
    norm.__class__ = Subclass
    return norm


def parametrized(norm):
    parametrize.register_parametrization(norm, 'weight', Same())
    return norm


CHANGES = dict(
    wrapped=Wrapper, of_a_subclass=of_a_subclass, parametrized=parametrized,
    compiled=lambda norm: torch.compile(norm, backend='eager'),
)  # fmt: skip


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_norm_takes_the_same_axis(change, deploy):
    backbone = trained()
    expected = copy.deepcopy(backbone).double()(IMAGE.double())
    for name in ('norm1', 'norm2'):
        setattr(backbone, name, CHANGES[change](getattr(backbone, name)))
    if deploy:
        backbone.switch_to_deploy()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for out, other in zip(backbone(IMAGE), expected):
                torch.testing.assert_close(out, other.float(), rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_a_unit_of_fsdp(tmp_path):
    """Sharded in place, over one process."""
    fsdp = pytest.importorskip('torch.distributed._composable.fsdp')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        backbone = trained()
        expected = [out.detach() for out in backbone(IMAGE)]
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
        for name in ('norm1', 'norm2'):
            fsdp.fully_shard(getattr(backbone, name), mesh=mesh)
        for out, other in zip(backbone(IMAGE), expected):
            torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


NORMS = [
    dict(type='LN', eps=1e-6), dict(type='LN', elementwise_affine=False), dict(type='BN'),
    dict(type='GN', num_groups=2), dict(type='IN'), dict(type='mmpretrain.LN2d'),
]  # fmt: skip


@pytest.mark.parametrize('norm_cfg', NORMS, ids=lambda cfg: ' '.join(map(str, cfg.values())))
def test_a_norm_of_each_kind(norm_cfg):
    """It normalizes what its class says, here computed by hand."""
    pytest.importorskip('mmpretrain.models')
    backbone, seen = trained(stage_norm_cfg=norm_cfg), []
    backbone.block1[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = backbone(IMAGE)[0]
    x, norm = seen[0].double(), copy.deepcopy(backbone.norm1).double()
    if norm_cfg['type'] in ('BN', 'GN', 'IN'):
        expected = norm(x)
    else:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        expected = (x - mean) / (variance + norm.eps).sqrt()
        if norm.weight is not None:
            expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('layout', 'copies'), [(torch.contiguous_format, 2), (torch.channels_last, 0)]
)
def test_a_stage_norm_copies_no_more_than_the_authors(layout, copies):
    """They make a map channels-last for LayerNorm, and NCHW again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names = ('aten::clone', 'aten::copy_', 'aten::contiguous')
            self.count += function._schema.name in names
            return function(*args, **(kwargs or {}))

    def outputs():
        backbone = trained(out_indices=(0,)).to('meta')
        if not with_norm:
            backbone.norm1, backbone.norms_last_axis = nn.Identity(), False
        image = torch.empty(2, 3, 64, 96, device='meta').to(memory_format=layout)
        with Copies() as mode, torch.no_grad():
            [out] = backbone(image)
        assert out.is_contiguous(memory_format=layout)
        return mode.count

    with_norm = False
    without = outputs()
    with_norm = True
    assert outputs() - without <= copies


@pytest.mark.parametrize('device', ['meta', 'cpu'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_maps_keep_the_layout_of_the_image(layout, device):
    """Inside, too, but on a CPU, which computes in channels_last."""
    backbone, found = trained().to(device, memory_format=layout), {}
    for name in ('patch_embed1', 'block1.0', 'block1.1', 'patch_embed2', 'block2.0'):
        backbone.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: output})
        )
    image = torch.zeros(2, 3, 64, 96, device=device).to(memory_format=layout)
    with torch.no_grad():  # torch 2.1 cannot recompute on the meta device
        outs = backbone(image)
    assert len(found) == 5
    if device == 'meta':
        assert all(out.is_contiguous(memory_format=layout) for out in found.values())
    assert all(out.is_contiguous(memory_format=layout) for out in outs)
