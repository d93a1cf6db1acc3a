"""Kernels of another size, and VAN's as 1-D ones."""

import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from scipy.optimize import least_squares
from torch import nn

from conftest import (
    ROOT,
    SMALL,
    published_state,
    reference_error,
    reference_image,
    small,
)
from lska_mm import LSKA, LSKAVAN
from lska_mm.checkpoint import CheckpointError, convert_state_dict, describe
from lska_mm.convert import write_checkpoint
from lska_mm.kernels import resize_kernels, separate_kernels
from lska_mm.models.lska import ATTENTIONS, kernel_layout, split_kernel

PAIRS = [*combinations((23, 35, 41, 53, 65), 2), (7, 11)]
GATE = 'block1.0.attn.spatial_gating_unit'
RESIZE = 'tools/model_converters/resize_kernel.py'
VAN2LSKA = 'tools/model_converters/van2lska.py'


def trained(**kwargs):
    """A small backbone whose biases, norms and scales are random, too."""
    backbone = small(**kwargs).eval()
    for name, values in backbone.state_dict().items():
        if values.dim() == 1:
            low, high = (0.5, 1.5) if re.search(r'var|norm.*weight', name) else (-0.3, 0.3)
            nn.init.uniform_(values, low, high)
    return backbone


def largest_difference(ours, theirs, sides, dtype=torch.float64):
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    differences = []
    with torch.no_grad():
        for side in sides:
            image = torch.rand(1, 3, *side, dtype=dtype)
            differences += [(a - b).abs().max().item() for a, b in zip(ours(image), theirs(image))]
    return max(differences)


# --- The same function -------------------------------------------------------------


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


def test_what_converters_write_may_be_for_inference(tmp_path):
    backbone = trained(kernel_size=23)
    backbone.switch_to_deploy()
    state, _ = resize_kernels(backbone.state_dict(), 35)
    path, description = write_checkpoint(state, tmp_path / 'deployed.pth')
    assert description['kernel_size'] == 35
    del state['backbone.norm2.bias']
    path.unlink()
    with pytest.raises(CheckpointError, match=r'missing \(first: norm2.bias\)'):
        write_checkpoint(state, tmp_path / 'deployed.pth')
    assert not list(tmp_path.iterdir())


def test_a_size_a_stage():
    state, _ = resize_kernels(trained(kernel_size=23).state_dict(), [53, 35])
    gate = 'backbone.block{}.0.attn.spatial_gating_unit.conv_spatial_h.weight'
    assert [state[gate.format(stage)].shape[-1] for stage in (1, 2)] == [17, 11]


# --- What is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ('attention', 'k', 'other', 'nearest', 'match'),
    [
        ('LSKA', 11, 23, False, rf'{GATE}: the taps of kernel size 11 lie 2 pixels apart, those '
         r'of 23 3 apart, so that it cannot be the same function. nearest=True \(--nearest\)'),
        ('LKA', 23, 11, False, 'lie 3 pixels apart, those of 11 2 apart'),
        ('LSKA', 53, 23, False, '160 taps of kernel size 53 that 23 lacks are not zero'),
        ('LKA-trivial', 11, 7, False, '576 taps of kernel size 11 that 7 lacks are not zero'),
        ('LKA', 53, 23, True, r'2-D kernels \(attention LKA\) have no nearest fit.*van2lska'),
        ('LSKA', 23, 24, False, r'kernel_size=24 cannot be split.*sizes are 23 and 29'),
        ('LSKA', 23, [35, 35, 53], False, r'kernel_size=\[35, 35, 53\]: one for all 2 stages'),
    ],
)  # fmt: skip
def test_refusals(attention, k, other, nearest, match):
    state = trained(attention=attention, kernel_size=k).state_dict()
    with pytest.raises((CheckpointError, ValueError), match=match):
        resize_kernels(state, other, nearest)


@pytest.mark.parametrize('change', [resize_kernels, lambda state, _: separate_kernels(state)])
def test_other_tensors_are_refused(change):
    match = r'No LSKA-VAN among the 1 tensors \(first: layer1.weight\)'
    with pytest.raises(CheckpointError, match=match):
        change({'layer1.weight': torch.ones(1)}, 23)


def test_a_missing_tensor_is_named():
    state = small(kernel_size=23).state_dict()
    del state[f'{GATE}.conv0h.bias']
    with pytest.raises(CheckpointError, match=rf'backbone.{GATE}.conv0h.bias is missing'):
        resize_kernels(state, 35)


# --- The nearest fit ---------------------------------------------------------------


def spatial_part(state, k, attention='LSKA'):
    """The depth-wise convolutions of the first gate."""
    weights = {key.split(f'{GATE}.')[1]: v for key, v in state.items() if f'{GATE}.' in key}
    gate = LSKA(8, k, attention).double()
    gate.load_state_dict(weights)
    return nn.Sequential(*list(gate.children())[:-1])


def dense_kernel(state, k, attention='LSKA'):
    """What they answer to an impulse, without biases: (C, 131, 131)."""
    convs = spatial_part(state, k, attention)
    for conv in convs:
        nn.init.zeros_(conv.bias)
    impulse = torch.zeros(1, 8, 131, 131, dtype=torch.float64)
    impulse[..., 65, 65] = 1
    return convs(impulse)[0].detach()


@pytest.mark.parametrize(
    ('attention', 'k', 'other'),
    [
        ('LSKA', 11, 23), ('LSKA', 53, 23), ('LSKA', 23, 11), ('LSKA-trivial', 53, 23),
        ('LKA-trivial', 11, 7),
    ],
)  # fmt: skip
def test_nearest_fit(attention, k, other):
    source = trained(attention=attention, kernel_size=k).state_dict()
    state, errors = resize_kernels(source, other, nearest=True)
    again, _ = resize_kernels(source, other, nearest=True)
    assert all(torch.equal(*pair) for pair in zip(state.values(), again.values()))
    small(attention=attention, kernel_size=other).load_state_dict(state)

    # The error that is said is that of the kernels seen from outside.
    old, new = dense_kernel(source, k, attention), dense_kernel(state, other, attention)
    true = (new - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
    assert len(errors) == sum(SMALL['depths'])
    torch.testing.assert_close(errors[GATE], true, rtol=1e-6, atol=1e-6)
    print(f'{attention} {k} as {other}: relative error {true.max():.3f} at most, '
          f'{true.mean():.3f} on average')  # fmt: skip

    zeros = torch.zeros(1, 8, 131, 131, dtype=torch.float64)
    middle = [spatial_part(s, size, attention)(zeros)[0, :, 65, 65]
              for s, size in ((source, k), (state, other))]  # fmt: skip
    assert middle[0].abs().min() > 1e-3
    torch.testing.assert_close(*middle, rtol=1e-6, atol=1e-6)
    if 'trivial' in attention:  # the nearest is the middle of the old
        inside = np.s_[:, 65 - other // 2 : 66 + other // 2, 65 - other // 2 : 66 + other // 2]
        torch.testing.assert_close(new[inside], old[inside])


def row_kernel(local, far, dilation):
    dilated = np.zeros((len(far) - 1) * dilation + 1)
    dilated[::dilation] = far
    return np.convolve(local, dilated)


@pytest.mark.parametrize(('k', 'other'), [(11, 23), (53, 23)])
def test_another_optimizer_finds_nothing_nearer(k, other):
    source = trained(kernel_size=k).double().state_dict()
    state, _ = resize_kernels(source, other, nearest=True)
    local, far, dilation = split_kernel(other)
    rng = np.random.default_rng(0)
    names = [f'{GATE}.{name}.weight' for name in ('conv0h', 'conv_spatial_h')]

    def distance(taps, target):
        return row_kernel(taps[:local], taps[local:], dilation) - target

    for channel in range(4):
        old = row_kernel(*(source[name][channel].flatten().numpy() for name in names),
                         split_kernel(k).dilation)  # fmt: skip
        target = np.zeros(other)
        width = min(k, other)
        target[(other - width) // 2 :][:width] = old[(k - width) // 2 :][:width]
        ours = np.concatenate([state[f'backbone.{name}'][channel].flatten() for name in names])
        starts = rng.standard_normal((10, local + far))
        theirs = min(np.linalg.norm(least_squares(distance, start, args=(target,)).fun)
                     for start in starts)  # fmt: skip
        assert np.linalg.norm(distance(ours, target)) <= theirs * (1 + 1e-4)


def test_channels_of_zeros_stay_zero():
    source = trained(kernel_size=11).state_dict()
    for key, value in source.items():
        if f'{GATE}.conv' in key and value.dim() == 4 and 'conv1' not in key:
            value[0] = 0
    state, errors = resize_kernels(source, 23, nearest=True)
    assert errors[GATE][0] == 0
    assert not dense_kernel(state, 23)[0].any()
    assert all(value.isfinite().all() for value in state.values())


# --- In a config -------------------------------------------------------------------


def resized_backbone(path, **kwargs):
    nearest = kwargs.pop('nearest', False)
    init_cfg = dict(type='ResizedPretrained', checkpoint=str(path), nearest=nearest)
    backbone = LSKAVAN(**{**dict(arch=SMALL, kernel_size=53, out_indices=(0, 1)), **kwargs},
                       init_cfg=init_cfg)  # fmt: skip
    backbone.init_weights()
    return backbone.eval()


@pytest.fixture
def small_file(tmp_path):
    backbone = trained(kernel_size=23)
    torch.save(dict(state_dict=backbone.state_dict()), tmp_path / 'k23.pth')
    return tmp_path / 'k23.pth', backbone


def test_initialiser(small_file):
    path, backbone = small_file
    assert largest_difference(backbone, resized_backbone(path), [(61, 83)]) <= 1e-12
    first = resized_backbone(path, out_indices=(0,))
    assert largest_difference(backbone, first, [(61, 83)]) <= 1e-12


def test_initialiser_in_a_detector(published_file):
    """Nothing that is initialised later overwrites it."""
    cfg = Config.fromfile(ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py')
    cfg.model.backbone.kernel_size = 35
    cfg.model.backbone.init_cfg = dict(type='ResizedPretrained', checkpoint=str(published_file))
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    with torch.no_grad():
        assert reference_error(detector.backbone.eval()(reference_image())) <= 1e-5


def test_initialiser_says_what_it_did(small_file, monkeypatch, capsys):
    path, _ = small_file
    for handler in MMLogger.get_current_instance().handlers:
        monkeypatch.setattr(handler, 'stream', sys.stdout, raising=False)
    resized_backbone(path)
    resized_backbone(path, kernel_size=11, nearest=True)
    printed = capsys.readouterr().out
    assert f'{path}: attention kernels of size 23 resized to 53, the same function' in printed
    assert re.search(r'size 23 resized to 11, not the same function: dense kernels differ by up '
                     r'to 0\.\d+, on average 0\.\d+ of their norm', printed)  # fmt: skip


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(kernel_size=11), r'those of 11 2 apart.*nearest=True'),
        (dict(arch=dict(SMALL, depths=[1, 1])), r"depths': \[2, 1\].*depths': \[1, 1\].*Nothing"),
        (dict(attention='LKA'), "attention='LSKA'.*attention='LKA'.*Nothing was loaded"),
        (dict(in_channels=4), r'in_channels=3.*in_channels=4'),
    ],
)
def test_initialiser_refuses(small_file, kwargs, match):
    with pytest.raises(CheckpointError, match=match):
        resized_backbone(small_file[0], **kwargs)


def test_initialiser_is_for_the_backbone_only(small_file):
    gate = LSKA(8, 53, init_cfg=dict(type='ResizedPretrained', checkpoint=str(small_file[0])))
    with pytest.raises(TypeError, match='for the init_cfg of an LSKAVAN backbone, not of LSKA'):
        gate.init_weights()


# --- From VAN ----------------------------------------------------------------------


@pytest.mark.parametrize(('attention', 'k'), [('LKA', 23), ('LKA', 35), ('LKA-trivial', 11)])
def test_products_are_found_again(attention, k):
    van = trained(attention=attention, kernel_size=k)
    for name, parameter in van.named_parameters():
        if re.search(r'conv0\.weight|conv_spatial\.weight', name):
            side = parameter.shape[-1]
            rows, columns = torch.randn(2, *parameter.shape[:2], side).double() / side**0.5
            parameter.data = columns[..., None] * rows[..., None, :]
    state, shares = separate_kernels(van.double().state_dict())
    separated = small(attention=f'LS{attention[1:]}', kernel_size=k).double().eval()
    separated.load_state_dict(state)
    assert min(shares.values()) == pytest.approx(1, abs=1e-12)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        difference = largest_difference(van, separated, [(61, 83), (24, 40)], dtype)
        print(f'{attention} k={k}, {dtype}: largest difference of the outputs {difference:.1e}')
        assert difference <= atol


@pytest.mark.parametrize('attention', ['LKA', 'LKA-trivial'])
def test_separated_kernels_are_the_nearest_products(attention):
    source = trained(attention=attention, kernel_size=11).state_dict()
    state, shares = separate_kernels(source)
    assert len(shares) == sum(SMALL['depths']) * len(kernel_layout(attention, 11))
    pairs = {'conv0': ('conv0h', 'conv0v'), 'conv_spatial': ('conv_spatial_h', 'conv_spatial_v')}
    for name, share in shares.items():
        gate, conv = name.rsplit('.', 1)
        row, column = (f'backbone.{gate}.{part}' for part in pairs[conv])
        kept = total = 0
        for channel, kernel in enumerate(source[f'{name}.weight'][:, 0].double().numpy()):
            values = np.linalg.svd(kernel, compute_uv=False)
            kept, total = kept + values[0] ** 2, total + (values**2).sum()
            rows, columns = (state[f'{key}.weight'][channel].flatten() for key in (row, column))
            error = np.linalg.norm(np.outer(columns, rows) - kernel)
            assert error == pytest.approx(np.sqrt((values[1:] ** 2).sum()), rel=1e-5)
            assert rows.norm() == pytest.approx(columns.norm().item(), rel=1e-5)
            assert rows[rows.abs().argmax()] > 0
        assert share == pytest.approx(kept / total, rel=1e-6)
        assert not state[f'{row}.bias'].any()
        assert torch.equal(state[f'{column}.bias'], source[f'{name}.bias'])


def test_separating_twice_is_refused():
    with pytest.raises(CheckpointError, match=r'1-D already \(attention LSKA, kernel size 11\)'):
        separate_kernels(small().state_dict())


# --- The tools ---------------------------------------------------------------------


def written_file(printed):
    return Path(printed.strip().splitlines()[-1].removeprefix('written to '))


def test_resize_tool(run, published_file, tmp_path):
    out = tmp_path / 'new/tiny_k53.pth'
    printed = run('python', RESIZE, published_file, out, '--kernel-size', 53)
    assert 'found arch tiny, attention LSKA, kernel size 23, ' in printed
    assert 'arch tiny, attention LSKA, kernel size 53: the same function' in printed
    assert 'left out, as it belongs to the old kernels: args, epoch' in printed
    path = written_file(printed)
    assert re.fullmatch(r'tiny_k53-[0-9a-f]{8}\.pth', path.name)
    assert list(out.parent.iterdir()) == [path]
    backbone = LSKAVAN('tiny', 53, out_indices=(0, 1, 2, 3),
                       init_cfg=dict(type='Pretrained', checkpoint=str(path)))  # fmt: skip
    backbone.init_weights()
    with torch.no_grad():
        assert reference_error(backbone.eval()(reference_image())) <= 1e-5
    assert 'head.fc.weight' in torch.load(path, weights_only=True)['state_dict']


def test_resize_tool_fits_and_keeps_meta(run, tmp_path):
    source = trained(kernel_size=11)
    meta = dict(dataset_meta=dict(classes=('a', 'b')), cfg='x = 1')
    torch.save(dict(meta=meta, state_dict=source.state_dict(), optimizer={}), tmp_path / 'in.pth')
    command = ('python', RESIZE, tmp_path / 'in.pth', tmp_path / 'out.pth', '--kernel-size')
    printed = run(*command, 23, '--nearest')
    _, errors = resize_kernels(source.state_dict(), 23, nearest=True)
    error = errors[GATE]
    assert f'{GATE}: relative error {error.max():.3g} at most, {error.mean():.3g} on' in printed
    assert 'not the same function: dense kernels differ by up to' in printed
    assert 'left out, as it belongs to the old kernels: optimizer, meta.cfg' in printed
    content = torch.load(written_file(printed), weights_only=True)
    assert content['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert describe(content['state_dict'])['kernel_size'] == 23

    written_file(printed).unlink()
    refused = run(*command, 24, code=1)
    assert refused.splitlines()[-1].startswith('resize_kernel.py: kernel_size=24 cannot be split')
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


def test_van2lska_tool(run, tmp_path):
    from mmpretrain.registry import MODELS as CLASSIFIERS

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    van = CLASSIFIERS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VAN', arch='tiny'),
            head=dict(type='LinearClsHead', num_classes=1000, in_channels=256),
        )
    )
    torch.save(dict(state_dict=van.state_dict(), meta={}), tmp_path / 'van.pth')
    printed = run('python', VAN2LSKA, tmp_path / 'van.pth', tmp_path / 'tiny.pth')
    print(printed)
    assert 'found arch tiny, attention LKA, kernel size 23' in printed
    assert re.search(rf'{GATE}.conv0: \d\d\.\d% of the energy kept', printed)
    shares = [float(share) for share in re.findall(r'\.conv\w+: (\S+)% of', printed)]
    assert len(shares) == 2 * 13
    assert f'attention LSKA, kernel size 23: {min(shares):.1f}% of the energy kept at' in printed

    cfg = Config.fromfile(ROOT / 'configs/classification/lska-van-tiny_4xb128_in1k.py')
    cfg.model.backbone.init_cfg = None
    classifier = CLASSIFIERS.build(cfg.model)
    path = written_file(printed)
    classifier.load_state_dict(torch.load(path, weights_only=True)['state_dict'], strict=True)
    assert torch.equal(classifier.head.fc.weight, van.head.fc.weight)
    assert torch.equal(classifier.backbone.norm4.bias, van.backbone.norm4.bias)


@pytest.mark.parametrize(
    ('state', 'match'),
    [
        ({'layer1.weight': torch.ones(1)}, 'holds no LSKA-VAN'),
        (small().state_dict(), r'1-D already \(attention LSKA, kernel size 11\)'),
    ],
)
def test_van2lska_tool_refuses_others(run, tmp_path, state, match):
    torch.save(dict(state_dict=state), tmp_path / 'in.pth')
    printed = run('python', VAN2LSKA, tmp_path / 'in.pth', tmp_path / 'out/x.pth', code=1)
    assert re.search(rf'^van2lska.py: .*{match}', printed, re.MULTILINE)
    assert 'Traceback' not in printed
    assert not (tmp_path / 'out').exists()
