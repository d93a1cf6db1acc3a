"""What people do to a built backbone counts, whatever is computed faster.

Each thing is done to our backbone and, beside it, to mmpretrain's VAN. Ours must then give
what a copy in double precision gives, which only the plain operators compute.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import SMALL, small, trained
from lska_mm import LSKA, LSKAVAN, LSKANeck
from lska_mm.fast import door
from lska_mm.models.block import MLP
from lska_mm.models.lska import ATTENTIONS, Attention

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
GATE = 'spatial_gating_unit'


def van():
    from mmpretrain.models import VAN

    model = VAN(dict(SMALL, depths=[2, 1]), out_indices=(0, 1))
    model.eval()  # which returns nothing there
    return model


def names_of(model):
    """Where convolutions and others are in the first block, in both backbones."""
    path = 'block1.0' if hasattr(model, 'block1') else 'blocks1.0'
    block = model.get_submodule(path)
    return block, {
        'proj_1': block.attn.proj_1,
        'gate': block.attn.spatial_gating_unit[0]
        if isinstance(block.attn.spatial_gating_unit, nn.Sequential)
        else block.attn.spatial_gating_unit.DW_conv,
        'proj_2': block.attn.proj_2,
        'fc1': block.mlp.fc1,
        'dwconv': block.mlp.dwconv,
        'fc2': block.mlp.fc2,
    }


def parent_of(model, part):
    """The module that holds ``part``, and its name there."""
    return next((parent, name) for parent in model.modules()
                for name, child in parent.named_children() if child is part)  # fmt: skip


CONVOLUTIONS = ('proj_1', 'gate', 'proj_2', 'fc1', 'dwconv', 'fc2')


def to_conv(change):
    """Do something to one convolution of each kind."""
    return {
        f'{change.__name__} {name}': lambda model, name=name: change(
            model, names_of(model)[1][name]
        )
        for name in CONVOLUTIONS
    }


# --- Things that are done ---------------------------------------------------------------


def hook(model, conv):
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(model, conv):
    conv.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replaced_forward(model, conv):
    conv.forward = lambda x: 2 * nn.functional.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def replaced_conv_forward(model, conv):
    own = type(conv)._conv_forward
    conv._conv_forward = lambda x, weight, bias: 2 * own(conv, x, weight, bias)


def pruned(model, conv):
    prune.l1_unstructured(conv, 'weight', 0.4)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model, conv):
    parametrize.register_parametrization(conv, 'weight', Twice())


def weight_normed(model, conv):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nn.utils.weight_norm(conv)
    conv.weight_g.data.mul_(2)


def circular(model, conv):
    if any(conv.padding):
        conv.padding_mode = 'circular'
        conv._reversed_padding_repeated_twice = [
            side for side in reversed(conv.padding) for _ in range(2)
        ]


def without_bias(model, conv):
    conv.bias = None


class Adapter(nn.Module):
    """Takes the place of a module, as LoRA's layers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def wrapped(model, conv):
    parent, name = parent_of(model, conv)
    setattr(parent, name, Adapter(conv))


class Subclass(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def of_a_subclass(model, conv):
    conv.__class__ = Subclass


def with_other_weight(model, conv):
    conv.weight = nn.Parameter(conv.weight.detach().flip(0).clone())


def changed_by_data(model, conv):
    conv.weight.data.mul_(2)


def in_other_strides(model, conv):
    conv.weight = nn.Parameter(conv.weight.detach().transpose(0, 1).clone().transpose(0, 1))


def dilated(model):
    conv = names_of(model)[1]['gate']
    height, width = conv.kernel_size
    conv.dilation, conv.padding = (2, 2), (2 * (height // 2), 2 * (width // 2))


def dilated_unevenly(model):
    conv = names_of(model)[1]['dwconv']
    conv = conv if isinstance(conv, nn.Conv2d) else conv.dwconv
    conv.dilation, conv.padding = (2, 1), (2, 1)


def in_groups(model):
    conv = names_of(model)[1]['proj_1']
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight.detach()[:, : conv.in_channels // 2])


def with_another_activation(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.ReLU())


def with_approximate_gelu(model):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = 'tanh'


def with_a_wider_kernel(model):
    conv = names_of(model)[1]['dwconv']
    conv = conv if isinstance(conv, nn.Conv2d) else conv.dwconv
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight.detach(), [1] * 4, value=0.1))
    conv.kernel_size, conv.padding = (5, 5), (2, 2)


def with_a_longer_gate(model):
    gate = names_of(model)[0].attn.spatial_gating_unit
    if isinstance(gate, nn.Sequential):
        gate.append(nn.Sigmoid())


def with_another_gate(model):
    names_of(model)[0].attn.spatial_gating_unit = nn.Hardswish()


def with_wrapped_branches(model):
    block, _ = names_of(model)
    block.attn, block.mlp = Adapter(block.attn), Adapter(block.mlp)


def hooks_of_branches(model):
    block, _ = names_of(model)
    for part in (block.attn, block.attn.spatial_gating_unit, block.mlp):
        part.register_forward_hook(lambda module, inputs, output: 2 * output)


def compiled_in_place(model):
    names_of(model)[0].attn.compile(backend='eager')


def with_frozen_weights(model):
    model.requires_grad_(False)


def with_hooks_of_gradients(model):
    for part in names_of(model)[1].values():
        part.register_full_backward_hook(lambda module, *gradients: None)
        part.register_full_backward_pre_hook(lambda module, gradient: None)


THINGS = {
    change.__name__: change
    for change in (
        dilated, dilated_unevenly, in_groups, with_another_activation, with_approximate_gelu,
        with_a_wider_kernel, with_a_longer_gate, with_another_gate, with_wrapped_branches,
        hooks_of_branches, compiled_in_place, with_frozen_weights, with_hooks_of_gradients,
    )
}  # fmt: skip
CHANGES = (
    hook, pre_hook, replaced_forward, replaced_conv_forward, pruned, parametrized, weight_normed,
    circular, without_bias, wrapped, of_a_subclass, with_other_weight, changed_by_data,
    in_other_strides,
)  # fmt: skip
for change in CHANGES:
    THINGS.update(to_conv(change))
# Of these, a convolution of each branch for each change, another from change to change.
SHORT = {
    f'{change.__name__} {CONVOLUTIONS[j + i % 3]}'
    for i, change in enumerate(CHANGES)
    for j in (0, 3)
}


def assert_same(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.detach(), other.detach(), rtol=tolerance,
            atol=tolerance * other.detach().abs().max().item(),
        )  # fmt: skip


def do(thing, model):
    try:
        return THINGS[thing](model)
    except AttributeError:  # of a VAN whose depth-wise convolution is a module around one
        if not hasattr(model, 'block1') and 'dwconv' in thing:
            return None
        raise


def outputs(thing, deploy, dtype):
    """What a backbone makes of an image with and without gradients, and what it made before."""
    model, image = trained().to(dtype), IMAGE.to(dtype)
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad():
        before = model(image)  # packs weights
    do(thing, model)
    outs = [before]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outs.append([out.detach() for out in model(image)])
    return outs


# Through .data PyTorch counts no version; a deployed block calls the parts of its branches.
CELLS = [
    pytest.param(thing, deploy, marks=[pytest.mark.soak] * (' ' in thing and thing not in SHORT))
    for thing in THINGS
    for deploy in (False, True)
    if not (deploy and thing.startswith(('changed_by_data', 'with_wrapped_branches')))
]
UNCHANGED = (
    'with_frozen_w',
    'with_hooks_of',
    'in_other_strides',
    'compiled',
    'circular',
    'hooks_o',
)


@pytest.mark.parametrize(('thing', 'deploy'), CELLS)
def test_what_is_done_to_a_part_counts(thing, deploy):
    stock = van()
    do(thing, stock)
    stock(IMAGE)
    before, *found = outputs(thing, deploy, torch.float32)
    _, expected, _ = outputs(thing, deploy, torch.float64)  # by plain operators
    for outs in found:
        assert_same(outs, [out.float() for out in expected])
    if not thing.startswith(UNCHANGED):
        assert (found[0][1] - before[1]).abs().max() > 1e-3


# --- The same function for whoever calls it ---------------------------------------------


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def patched(monkeypatch, owner, name):
    """Another function in the place of one that convolutions call, as profilers put there."""
    own, called = getattr(owner, name), []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **kw: called.append(1) or own(*a, **kw))
        yield
    assert called


@contextlib.contextmanager
def less_precise():
    torch.set_float32_matmul_precision('medium')
    yield
    torch.set_float32_matmul_precision('highest')


MODES = {
    'a dispatch mode': Counting,
    'a function mode': Listening,
    'a default device': lambda: torch.device('cpu'),
    'a global hook': global_hook,
    'inference mode': torch.inference_mode,
    'no oneDNN': lambda: torch.backends.mkldnn.flags(enabled=False),
    'saved tensors elsewhere': lambda: torch.autograd.graph.save_on_cpu(),
    'less precise products': less_precise,
}


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_under_a_mode(mode, deploy):
    model = trained()
    if deploy:
        model.switch_to_deploy()
    expected = [out.float() for out in copy.deepcopy(model).double()(IMAGE.double())]
    for grad in (True, False):
        with torch.set_grad_enabled(grad), MODES[mode]():
            found = model(IMAGE)
        assert_same(found, expected)


@pytest.mark.parametrize(('owner', 'name'), [
    (nn.functional, 'conv2d'), (nn.functional, 'gelu'), (nn.Conv2d, 'forward'),
    (nn.Conv2d, '_conv_forward'), (nn.GELU, 'forward'), (nn.Module, '__call__'),
    (LSKA, 'forward'), (Attention, 'forward'), (MLP, 'forward'),
])  # fmt: skip
def test_a_patched_class_or_function_is_called(monkeypatch, owner, name):
    model = trained()
    with torch.no_grad():
        expected = model(IMAGE)
        with patched(monkeypatch, owner, name):
            assert_same(model(IMAGE), expected)


@pytest.mark.parametrize('deploy', [False, True])
def test_traced_as_the_tutorial_has_it(deploy):
    """With PyTorch's own check, and to the same graph whoever traces."""
    model, operators = trained(), []
    if deploy:
        model.switch_to_deploy()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter('error', torch.jit.TracerWarning)
            traced = torch.jit.trace(model, IMAGE)
        operators.append([node.kind() for node in traced.inlined_graph.nodes()])
        assert_same(traced(IMAGE), model(IMAGE))
    assert operators[0] == operators[1]
    assert 'aten::_convolution' in operators[0]
    assert not any('mkldnn' in operator for operator in operators[0])


def test_symbolic_trace():
    model = trained()
    traced = torch.fx.symbolic_trace(model)
    assert 'block1.0.norm1' in {node.target for node in traced.graph.nodes}
    assert_same(traced(IMAGE), model(IMAGE))


@pytest.mark.parametrize('training', [False, True])
def test_quantized_by_fx(training):
    fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping

    model = trained().train(training)
    if training:
        prepared = fx.prepare_qat_fx(
            model.train(), get_default_qat_qconfig_mapping('x86'), (IMAGE,)
        )
    else:
        prepared = fx.prepare_fx(model, get_default_qconfig_mapping('x86'), (IMAGE,))
    prepared(IMAGE)
    converted = fx.convert_fx(prepared.eval())
    found = converted(IMAGE)
    assert 'quantized' in str(converted)
    if not training:
        assert (found[1] - model.eval()(IMAGE)[1]).abs().mean() < 0.3


@pytest.mark.parametrize('grad', [True, False])
def test_forward_mode_derivative(grad):
    from torch.autograd import forward_ad

    model, tangent = trained(), torch.randn_like(IMAGE)
    twin, step = copy.deepcopy(model).double(), 1e-5
    with torch.no_grad():
        outs = [twin(IMAGE.double() + sign * step * tangent)[1] for sign in (1, -1)]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(IMAGE, tangent))[1]).tangent
    assert_same([found], [((outs[0] - outs[1]) / (2 * step)).float()], 1e-3)


@pytest.mark.parametrize('grad', [True, False])
def test_function_transforms(grad):
    """vmap, jvp, grad, and what they make together; by `torch.func`."""
    model = trained()
    images = torch.rand(2, 1, 3, 32, 32)
    parameters = dict(model.named_parameters())

    def run(parameters, image):
        return torch.func.functional_call(model, parameters, (image,))[1]

    with torch.set_grad_enabled(grad):
        mapped = torch.func.vmap(lambda image: run(parameters, image))(images)
        assert_same(mapped, [model(image)[1] for image in images])
        gradients = torch.func.grad(lambda p: run(p, images[0]).square().sum())(parameters)
    model(images[0])[1].square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-3:
            assert_same([gradients[name]], [parameter.grad], 1e-3)


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


# --- Whoever listens --------------------------------------------------------------------

EVERY = ('attn.proj_1', 'attn.activation', f'attn.{GATE}.conv0h', f'attn.{GATE}.conv1',
         f'attn.{GATE}', 'attn.proj_2', 'attn', 'mlp.fc1', 'mlp.dwconv', 'mlp.act', 'mlp.fc2',
         'mlp.drop', 'mlp', 'norm1', 'norm2', 'drop_path')  # fmt: skip


def test_hooks_see_the_same_with_and_without_gradients():
    """And what they keep stays as it was."""
    model, seen = trained(), []
    for name in EVERY:
        model.block1[0].get_submodule(name).register_forward_hook(
            lambda module, inputs, output: seen.append((output, output.clone()))
        )
    outs = []
    for grad in (False, True):
        seen.clear()
        with torch.set_grad_enabled(grad):
            model(IMAGE)
        assert all(torch.equal(output, kept) for output, kept in seen)
        outs.append([output for output, _ in seen])
    assert len(outs[0]) == len(EVERY) + 2  # dropout and drop path are called twice
    assert_same(*outs)


class Dropping(Adapter):
    """An adapter that draws numbers, as LoRA's dropout does."""

    def forward(self, x):
        return nn.functional.dropout(self.module(x), 0.5)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', ['mlp', 'mlp.fc2', 'attn.proj_1'])
def test_an_adapter_that_draws_numbers_draws_them_once(name, with_cp):
    """The gradient of a factor is the sum over what it was multiplied with."""
    gradients = []
    for recompute in (with_cp, False):
        model = small(with_cp=recompute).train()
        block, (path, _, last) = model.block1[0], name.rpartition('.')
        setattr(block.get_submodule(path), last, Dropping(block.get_submodule(name)))
        torch.manual_seed(0)
        model(IMAGE)[1].square().sum().backward()
        gradients.append(block.layer_scale_2.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_dropout_that_is_switched_on_drops():
    """Monte-Carlo dropout: in evaluation, but for the dropouts; deployed, too."""
    for deploy in (False, True):
        model = trained(drop_rate=0.5)
        if deploy:
            model.switch_to_deploy()
        with torch.no_grad():
            assert torch.equal(model(IMAGE)[1], model(IMAGE)[1])
            model.block1[0].mlp.drop.train()
            assert not torch.equal(model(IMAGE)[1], model(IMAGE)[1])


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


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('grad', [True, False])
def test_maps_come_back_in_the_layout_they_had(grad, layout):
    x = torch.rand(2, 16, 9, 7).contiguous(memory_format=layout)
    with torch.set_grad_enabled(grad):
        for module in (LSKA(16), lambda x: LSKANeck(16, 1)([x])[0]):
            assert module(x).is_contiguous(memory_format=layout)
    assert x.is_contiguous(memory_format=layout)


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
