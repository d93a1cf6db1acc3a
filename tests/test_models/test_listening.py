"""Whoever listens to the modules, or changes them, is heard; in inference on a CPU too."""

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from conftest import small
from lska_mm import LSKA, LSKAVAN
from lska_mm.models.lska import ATTENTIONS

CONVS = ('attn.proj_1', 'attn.spatial_gating_unit.conv0h', 'attn.spatial_gating_unit.conv1',
         'attn.proj_2', 'mlp.fc1', 'mlp.dwconv', 'mlp.fc2')  # fmt: skip
EVERY = (*CONVS, 'attn', 'attn.spatial_gating_unit', 'mlp', 'mlp.drop', 'norm1', 'norm2')
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone():
    """In evaluation, with layer scales that let every change be seen."""
    backbone = small().eval()
    for block in [*backbone.block1, *backbone.block2]:
        nn.init.ones_(block.layer_scale_1)
        nn.init.ones_(block.layer_scale_2)
    return backbone


@pytest.mark.parametrize('grad', [False, True])
def test_every_module_is_called_and_what_a_hook_keeps_stays(backbone, grad):
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            kept[name] = [(x, x.clone()) for x in (*inputs[:1], output)]

        return hook

    plain = backbone(IMAGE)[1].detach()
    for name in EVERY:
        backbone.block1[0].get_submodule(name).register_forward_hook(keep(name))
    with torch.set_grad_enabled(grad):
        outs = backbone(IMAGE)
    assert kept.keys() == set(EVERY)
    assert all(torch.equal(x, copy) for pairs in kept.values() for x, copy in pairs)
    torch.testing.assert_close(outs[1].detach(), plain, rtol=1e-4, atol=1e-5)


def test_hooks_see_the_same_with_and_without_gradients(backbone):
    seen = []
    for name in EVERY:
        module = backbone.block1[0].get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        backbone(IMAGE)
    without, seen[:] = list(seen), []
    backbone(IMAGE)
    assert len(without) == len(seen)
    for a, b in zip(without, seen):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def replace_forward(conv):
    forward = type(conv).forward
    conv.forward = lambda x: 2 * forward(conv, x)


def change_by_hook(conv):
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def change_input(conv):
    conv.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = dict(
    replaced_forward=replace_forward,
    hook=change_by_hook,
    pre_hook=change_input,
    parametrization=lambda conv: parametrize.register_parametrization(conv, 'weight', Twice()),
    pruning=lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', CONVS)
def test_a_changed_convolution_counts(backbone, name, change):
    with torch.no_grad():
        before = backbone(IMAGE)[1]
    CHANGES[change](backbone.block1[0].get_submodule(name))
    with torch.no_grad():
        without = backbone(IMAGE)[1]
    assert not torch.allclose(before, without, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(without, backbone(IMAGE)[1].detach(), rtol=1e-4, atol=1e-4)


class Adapter(nn.Module):
    """Takes the place of a module, as LoRA's layers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


@pytest.mark.parametrize('name', ['mlp', 'attn', 'mlp.fc2', 'attn.proj_2', 'mlp.dwconv'])
def test_a_module_may_be_wrapped(backbone, name):
    block, (path, _, last) = backbone.block1[0], name.rpartition('.')
    setattr(block.get_submodule(path), last, Adapter(block.get_submodule(name)))
    with torch.no_grad():
        without = backbone(IMAGE)[1]
    torch.testing.assert_close(without, backbone(IMAGE)[1].detach(), rtol=1e-4, atol=1e-4)
    backbone.train()(IMAGE)[1].sum().backward()


@pytest.mark.parametrize('name', ['mlp.fc2', 'mlp.drop'])
def test_hooks_are_called_once_a_training_step(backbone, name):
    """Though what nobody listens to is computed again in the backward pass."""
    called = []
    module = backbone.train().block1[0].get_submodule(name)
    module.register_forward_hook(lambda module, inputs, output: called.append(module))
    backbone(IMAGE)[1].sum().backward()
    assert len(called) == (2 if name == 'mlp.drop' else 1)  # it is called twice in a forward pass


class Dropping(Adapter):
    """An adapter that draws numbers, as LoRA's dropout does."""

    def forward(self, x):
        return nn.functional.dropout(self.module(x), 0.5)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', ['mlp', 'mlp.fc2', 'attn.proj_1'])
def test_an_adapter_that_draws_numbers_draws_them_once(name, with_cp):
    """The gradient of a factor is the sum over what it was multiplied with."""
    backbone = small(with_cp=with_cp).train()
    block, (path, _, last) = backbone.block1[0], name.rpartition('.')
    setattr(block.get_submodule(path), last, Dropping(block.get_submodule(name)))
    out = []
    for seed in (0, 0):
        torch.manual_seed(seed)
        backbone.zero_grad()
        backbone(IMAGE)[1].square().sum().backward()
        out.append(block.layer_scale_2.grad.clone())
    torch.manual_seed(0)
    plain = small(with_cp=False).train()
    block, (path, _, last) = plain.block1[0], name.rpartition('.')
    setattr(block.get_submodule(path), last, Dropping(block.get_submodule(name)))
    plain.load_state_dict(backbone.state_dict())
    torch.manual_seed(0)
    plain(IMAGE)[1].square().sum().backward()
    assert torch.equal(out[0], out[1])
    torch.testing.assert_close(out[0], plain.block1[0].layer_scale_2.grad, rtol=1e-3, atol=1e-4)


def test_dropout_that_is_switched_on_drops(backbone):
    """Monte-Carlo dropout: in evaluation, but for the dropouts."""
    backbone = small(drop_rate=0.5).eval()
    with torch.no_grad():
        assert torch.equal(backbone(IMAGE)[1], backbone(IMAGE)[1])
        for block in backbone.block1:
            block.mlp.drop.train()
            nn.init.ones_(block.layer_scale_2)
        assert not torch.equal(backbone(IMAGE)[1], backbone(IMAGE)[1])


def test_global_hooks_are_called(backbone):
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: called.append(module)
    )
    try:
        with torch.no_grad():
            backbone(IMAGE)
    finally:
        handle.remove()
    assert {backbone.block1[0].get_submodule(name) for name in EVERY} <= set(called)


def test_counters_agree():
    """0.83 G multiply-adds, with gradients, without, and by MMEngine's counter."""
    backbone = LSKAVAN().eval()
    counts = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            backbone(torch.zeros(1, 3, 224, 224))
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] == counts[1]
    assert 0.83e9 < counts[0] < 0.834e9
    own = get_model_complexity_info(backbone, (3, 224, 224), show_table=False, show_arch=False)
    assert own['flops'] == pytest.approx(counts[0], rel=0.03)  # counts norms, too


def test_symbolic_trace(backbone):
    traced = torch.fx.symbolic_trace(backbone)
    names = {node.target for node in traced.graph.nodes}
    assert 'block1.0.norm1' in names
    for out, expected in zip(traced(IMAGE), backbone(IMAGE)):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_vmap(backbone):
    images = torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda image: backbone(image)[1])(images)
        torch.testing.assert_close(mapped[1], backbone(images[1])[1], rtol=1e-4, atol=1e-5)


# --- No image at all -----------------------------------------------------------------


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_an_empty_batch(attention, grad):
    gate = LSKA(16, 11, attention)
    for module, shape in ((gate, (16, 14, 14)), (small(attention=attention), (3, 32, 32))):
        for training in (True, False):
            module.train(training)
            if training and module is not gate:
                continue  # a BatchNorm in training takes none
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


# --- Layout --------------------------------------------------------------------------


@pytest.mark.parametrize('device', ['meta', 'cpu'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_maps_keep_the_layout_of_the_image(layout, device):
    """Inside, too, but on a CPU, which computes in channels_last."""
    backbone = LSKAVAN(out_indices=(0, 1, 2, 3)).to(device, memory_format=layout).eval()
    found = {}
    for stage in range(1, 5):
        for name in (f'patch_embed{stage}', f'block{stage}.0', f'block{stage}.1'):
            backbone.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: found.update({name: output})
            )
    image = torch.empty(2, 3, 64, 96, device=device).to(memory_format=layout)
    with torch.no_grad():  # torch 2.1 cannot recompute on the meta device
        outs = backbone(image.normal_() if device == 'cpu' else image)
    print(layout, device, *found)
    assert len(found) == 12
    if device == 'meta':
        assert all(out.is_contiguous(memory_format=layout) for out in found.values())
    assert all(out.is_contiguous(memory_format=layout) for out in outs)


@pytest.mark.parametrize(
    ('layout', 'copies'), [(torch.contiguous_format, 2), (torch.channels_last, 0)]
)
def test_a_stage_norm_copies_no_more_than_the_authors(layout, copies):
    """They make a map channels-last for LayerNorm, and NCHW again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function._schema.name in (
                'aten::clone',
                'aten::copy_',
                'aten::contiguous',
            )
            return function(*args, **(kwargs or {}))

    from lska_mm.models.layers import norm_channels

    norm = nn.LayerNorm(8, device='meta')
    x = torch.empty(2, 8, 4, 6, device='meta').to(memory_format=layout)
    with Copies() as mode, torch.no_grad():
        out = norm_channels(norm, x)
    assert out.is_contiguous(memory_format=layout)
    assert mode.count <= copies
