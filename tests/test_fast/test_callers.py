"""The same function for whoever calls, traces, transforms, counts or listens."""

import contextlib
import copy
import warnings

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from changes import Adapter
from conftest import assert_same, small, trained
from lska_mm import LSKA, LSKAVAN
from lska_mm.models.block import MLP
from lska_mm.models.lska import Attention

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
GATE = 'spatial_gating_unit'


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
    (nn.Conv2d, '__call__'), (nn.GELU, '__call__'), (nn.Module, '_call_impl'),
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
