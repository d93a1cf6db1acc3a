"""Kernels of another size that are the same function."""

from itertools import combinations

import pytest
import torch

from conftest import GATE, largest_difference, published_state, small, trained, written_file
from lska_mm.models.lska import ATTENTIONS
from lska_mm.weights.match import describe
from lska_mm.weights.names import CheckpointError, convert_state_dict
from lska_mm.weights.resize import resize_kernels

PAIRS = [*combinations((23, 35, 41, 53, 65), 2), (7, 11)]
CONVERT = 'tools/model_converters/convert_checkpoint.py'


@pytest.mark.parametrize(
    ('attention', 'k', 'larger'),
    [('LSKA', *pair) for pair in PAIRS]
    + [(attention, *pair) for attention in ATTENTIONS[1:] for pair in ((23, 35), (7, 11))],
)
def test_a_larger_kernel_is_the_same_function(attention, k, larger):
    backbone = trained(attention=attention, kernel_size=k)
    source = backbone.state_dict()
    state, errors = resize_kernels(source, larger)
    assert errors == {}
    grown = small(attention=attention, kernel_size=larger).eval()
    grown.load_state_dict(state)
    back, _ = resize_kernels(state, k)
    assert list(back) == list(convert_state_dict(source))
    assert all(torch.equal(*pair) for pair in zip(back.values(), source.values()))
    # The maps are 68 x 72 pixels, more than any kernel, and 6 x 10, less than all.
    for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        difference = largest_difference(backbone, grown, [(272, 288), (24, 40)], dtype)
        print(f'{attention} k={k} as {larger}, {dtype}: largest difference {difference:.1e}')
        assert difference <= atol


@pytest.mark.parametrize('attention', ['LSKA-trivial', 'LKA-trivial'])
def test_without_dilation_every_size_grows(attention):
    backbone = trained(attention=attention, kernel_size=7)
    state, errors = resize_kernels(backbone.state_dict(), 53)
    assert errors == {}
    grown = small(attention=attention, kernel_size=53).eval()
    grown.load_state_dict(state)
    assert largest_difference(backbone, grown, [(61, 83)]) <= 1e-12


def test_far_taps_of_zero_have_no_dilation():
    state = trained(kernel_size=11).state_dict()
    for key, value in state.items():
        if 'conv_spatial' in key and value.dim() == 4:
            value.flatten(1)[:, [0, 1, 3, 4]] = 0
    backbone, grown = small(kernel_size=11).eval(), small(kernel_size=23).eval()
    backbone.load_state_dict(state)
    resized, errors = resize_kernels(state, 23)
    grown.load_state_dict(resized)
    assert errors == {}
    assert largest_difference(backbone, grown, [(61, 83)]) <= 1e-12


def test_published_layout_and_parts_of_a_model():
    state, _ = resize_kernels(published_state(), 53)
    assert state['head.fc.weight'].shape == (1000, 256)
    assert describe(state)['kernel_size'] == 53
    backbone = trained(kernel_size=7)
    backbone.switch_to_deploy()
    parts = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    state, errors = resize_kernels({**parts, 'neck.conv.weight': torch.ones(1)}, 11)
    assert state['neck.conv.weight'] == 1
    assert errors == {}
    grown = small(kernel_size=11, deploy=True)
    grown.load_state_dict({k: v for k, v in state.items() if 'neck' not in k})
    assert largest_difference(backbone, grown, [(61, 83)]) <= 1e-12


def test_a_size_a_stage():
    state, _ = resize_kernels(trained(kernel_size=23).state_dict(), [53, 35])
    gate = 'backbone.block{}.0.attn.spatial_gating_unit.conv_spatial_h.weight'
    assert [state[gate.format(stage)].shape[-1] for stage in (1, 2)] == [17, 11]


# --- What is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ('attention', 'k', 'other', 'nearest', 'match'),
    [
        ('LSKA', 11, 23, False, rf'{GATE}: kernel size 23 has no place for 64 nonzero taps; '
         r'.* nearest=True \(--nearest\)'),
        ('LKA', 23, 11, False, 'kernel size 11 has no place'),
        ('LSKA', 53, 23, False, 'kernel size 23 has no place for 160 nonzero taps'),
        ('LKA-trivial', 11, 7, False, 'for 576 nonzero taps'),
        ('LKA', 53, 23, True, r'2-D kernels \(attention LKA\) cannot be fitted.*--separate'),
        ('LSKA', 23, 24, False, r'kernel_size=24 cannot be split.*: 23 and 29'),
        ('LSKA', 23, [35, 35, 53], False, 'has 3 values; .* each of the 2 stages'),
    ],
)  # fmt: skip
def test_refusals(attention, k, other, nearest, match):
    state = trained(attention=attention, kernel_size=k).state_dict()
    with pytest.raises((CheckpointError, ValueError), match=match):
        resize_kernels(state, other, nearest)


def test_other_tensors_are_refused():
    match = r'holds no LSKA-VAN \(1 tensors, first: layer1.weight\)'
    with pytest.raises(CheckpointError, match=match):
        resize_kernels({'layer1.weight': torch.ones(1)}, 23)


def test_a_missing_tensor_is_named():
    state = small(kernel_size=23).state_dict()
    del state[f'{GATE}.conv0h.bias']
    with pytest.raises(
        CheckpointError, match=rf'1 tensors are missing \(first: {GATE}.conv0h.bias'
    ):
        resize_kernels(state, 35)


# --- The tool ----------------------------------------------------------------------


def test_resize_tool_fits_and_keeps_meta(run, tmp_path):
    source = trained(kernel_size=11)
    meta = dict(dataset_meta=dict(classes=('a', 'b')), cfg='x = 1')
    torch.save(dict(meta=meta, state_dict=source.state_dict(), optimizer={}), tmp_path / 'in.pth')
    command = ('python', CONVERT, tmp_path / 'in.pth', tmp_path / 'out.pth')
    printed = run(*command, '--kernel-size', 23, '--nearest')
    _, errors = resize_kernels(source.state_dict(), 23, nearest=True)
    error = errors[GATE]
    assert f'{GATE}: relative error {error.max():.3g} at most, {error.mean():.3g} on' in printed
    assert 'not the same function: dense kernels differ by up to' in printed
    assert 'not copied, as it belongs to the old weights: optimizer, meta.cfg' in printed
    content = torch.load(written_file(printed), weights_only=True)
    assert content['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert describe(content['state_dict'])['kernel_size'] == 23
