import pytest
import torch
from mmengine.registry import MODELS

from conftest import load_tool
from lska_mm import LSKANeck

Attention = load_tool('.dev_scripts/benchmarking/plain_lska_van.py').Attention

SIZES = [(9, 13), (5, 7), (1, 1)]


def maps(channels=(8, 8, 8)):
    torch.manual_seed(0)
    return [torch.rand(2, c, *size) for c, size in zip(channels, SIZES)]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('in_channels', [8, [8, 16, 4]])
def test_equals_a_plain_block_on_every_map(in_channels, layout):
    inputs = maps([in_channels] * 3 if in_channels == 8 else in_channels)
    inputs = [x.contiguous(memory_format=layout) for x in inputs]
    originals = [x.clone() for x in inputs]
    neck = MODELS.build(dict(type='LSKANeck', in_channels=in_channels, num_outs=3, kernel_size=11))
    plain = [Attention(x.shape[1], 11) for x in inputs]
    for block, twin in zip(neck.blocks, plain):
        twin.load_state_dict(block.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outs = neck(tuple(inputs))
            for out, twin, x in zip(outs, plain, inputs):
                torch.testing.assert_close(out, twin(x), rtol=1e-5, atol=1e-6)
                assert out.is_contiguous(memory_format=layout)
    assert isinstance(outs, tuple)
    assert all(torch.equal(x, original) for x, original in zip(inputs, originals))


def test_every_parameter_gets_a_gradient():
    neck = LSKANeck(8, 3)
    sum(out.square().mean() for out in neck(maps())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


@pytest.mark.parametrize(
    ('kwargs', 'inputs', 'message'),
    [
        (dict(in_channels=[8, 8]), None, r'\[8, 8\] has 2 values; .* of the 3 maps \(num_outs'),
        (dict(kernel_size=24), None, '23 and 29'),
        (dict(attention='SE'), None, "attention='SE' is unknown"),
        ({}, maps()[:2], 'expects num_outs=3 maps, got 2'),
    ],
)
def test_errors(kwargs, inputs, message):
    with pytest.raises(ValueError, match=message):
        LSKANeck(**{'in_channels': 8, 'num_outs': 3, **kwargs})(inputs)


def test_hooks_of_its_blocks_are_called():
    neck = LSKANeck(8, 3, 11)
    neck.blocks[1].register_forward_hook(lambda block, inputs, out: out * 0)
    with torch.no_grad():
        assert [bool(out.any()) for out in neck(maps())] == [True, False, True]
