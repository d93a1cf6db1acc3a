"""The converters on backbones of every kind of norm, MLP ratio and number of bands."""

from itertools import product

import pytest
import torch
from mmengine.config import Config
from test_layouts import copies_layout
from torch import nn

from conftest import small, written_file
from lska_mm import LSKAVAN, ResizedPretrained

TOOLS = 'tools/model_converters'
NORMS = {
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=2),
    'IN': dict(type='IN'),
    'BN without affine': dict(type='BN', affine=False),
    'BN without statistics': dict(type='BN', track_running_stats=False),
}
STAGE_NORMS = {
    'LN': dict(type='LN', eps=1e-6),
    'BN': dict(type='BN'),
    'GN': dict(type='GN', num_groups=2),
    'LN2d': dict(type='mmpretrain.LN2d'),
}
# The kind of a converter: its arguments, what the backbone is before, and after.
KINDS = {
    'names': ([], {}, {}),
    'kernels': (['--kernel-size', 11], {}, dict(kernel_size=11)),
    'nearest kernels': (
        ['--kernel-size', 7, '--nearest'],
        dict(attention='LSKA-trivial', kernel_size=11),
        dict(kernel_size=7),
    ),
    'channels': (
        ['--in-channels', 6, '--kernel-size', 11],
        {},
        dict(in_channels=6, kernel_size=11),
    ),
    'separation': (['--separate'], dict(attention='LKA'), dict(attention='LSKA')),
    'folding': (None, {}, dict(deploy=True)),
}


@pytest.fixture
def convert(main):
    """Run a converter; returns the file it wrote, or the line it ended with."""

    def _convert(path, arguments):
        folds = arguments is None or '--norm-eps' in arguments
        tool = f'{TOOLS}/{"reparameterize_model" if folds else "convert_checkpoint"}.py'
        code, printed = main(tool, path, path.with_name('converted.pth'), *(arguments or []))
        if not code:
            return written_file(printed)
        assert list(path.parent.iterdir()) == [path]
        return printed.splitlines()[-1]

    return _convert


def as_trained(**kwargs):
    """A tiny backbone whose norms, scales and biases are random, in inference."""
    backbone = LSKAVAN(**{'kernel_size': 7, **kwargs}, out_indices=(0, 1)).eval()
    for name, tensor in backbone.state_dict().items():
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, *((0.5, 1.5) if 'var' in name else (-0.5, 0.5)))
        if '.conv0.' in name or '.conv_spatial.' in name:  # a product of a column and a row
            column, row = torch.randn(2, len(tensor), 1, tensor.shape[-1])
            tensor.copy_(column[..., None] * row[..., None, :] if tensor.dim() == 4 else tensor)
    return backbone


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('norm', NORMS)
def test_table(convert, tmp_path, norm, kind):
    """What is written loads into the backbone of the new setting, with the expected outputs."""
    pytest.importorskip('mmpretrain.models')
    torch.manual_seed(0)
    arguments, before, after = KINDS[kind]
    rows = []
    path, head = tmp_path / 'source.pth', torch.rand(2, 8)
    for i, (ratio, bands) in enumerate(product((8, 2.5), (1, 3, 4))):
        stage_norm = list(STAGE_NORMS)[(i + list(NORMS).index(norm)) % 4]
        settings = dict(
            arch=dict(embed_dims=[4, 8], depths=[1, 1], ffn_ratios=[ratio, ratio]),
            norm_cfg=NORMS[norm], stage_norm_cfg=STAGE_NORMS[stage_norm], in_channels=bands,
            **before,
        )  # fmt: skip
        cell = f'{kind} | {norm} | {stage_norm} | {ratio} | {bands}'
        source = as_trained(**settings)
        state = {f'backbone.{key}': value for key, value in source.state_dict().items()}
        if kind == 'names':
            state = copies_layout(source.state_dict())
        meta = dict(dataset_meta=dict(classes=('a', 'b')))
        torch.save(dict(state_dict={**state, 'decode_head.x': head}, meta=meta), path)
        written = convert(path, arguments)

        refusal = None
        if kind == 'channels' and bands == 4:
            refusal = 'for images of 4 channels; only those for 1 or 3 can be resized'
        if kind == 'folding' and norm not in ('BN', 'BN without affine'):
            refusal = 'patch_embed1.norm cannot be folded'
        if refusal:
            assert refusal in written, cell
            rows.append(f'| {cell} | {written} |')
            continue

        content = torch.load(written, weights_only=True)
        assert content['meta'] == meta
        converted = content['state_dict']
        assert torch.equal(converted.pop('decode_head.x'), head)
        settings = {'kernel_size': 7, **settings, **after}
        result = LSKAVAN(**settings, out_indices=(0, 1)).eval()
        result.load_state_dict(converted)
        image = torch.rand(2, 1, 64, 72) if kind == 'channels' else torch.rand(2, bands, 64, 72)
        with torch.no_grad():
            expected = source(image.expand(-1, bands, -1, -1))
            outputs = result(image.expand(-1, settings['in_channels'], -1, -1))
        error = max((a - b).abs().max().item() for a, b in zip(outputs, expected))
        assert (error <= 1e-4) == (kind != 'nearest kernels'), cell
        if kind in ('kernels', 'nearest kernels', 'channels'):
            other = LSKAVAN(**settings, out_indices=(0, 1))
            ResizedPretrained(str(path), nearest='nearest' in kind)(other)
            others = other.state_dict()
            assert all(torch.equal(value, others[key]) for key, value in
                       result.state_dict().items()), cell  # fmt: skip
        rows.append(f'| {cell} | {error:.0e} |')
        written.unlink()
    print('\n'.join(rows))


EPS = Config(dict(model=dict(backbone=dict(type='LSKAVAN', norm_cfg=dict(type='BN', eps=0.1)),
                             neck=dict(norm_cfg=dict(eps=0.2))))).pretty_text  # fmt: skip


@pytest.mark.parametrize(
    ('cfg', 'arguments', 'eps'),
    [
        (None, None, 1e-5),
        (EPS, None, 0.1),
        (EPS, ['--norm-eps', 0.3], 0.3),
        ("neck = dict(norm_cfg=dict(eps=0.2)); __import__('os').mkdir('ran')", None, 1e-5),
        ('not = Python', None, 1e-5),
    ],
)
def test_eps_of_the_norms_that_are_folded(convert, tmp_path, monkeypatch, cfg, arguments, eps):
    """It is not among the tensors; the config beside them is read, and not run."""
    monkeypatch.chdir(tmp_path)
    source = as_trained(norm_cfg=dict(type='BN', eps=eps))
    path = tmp_path / 'source.pth'
    torch.save(dict(state_dict=source.state_dict(), meta=dict(cfg=cfg)), path)
    result = LSKAVAN(kernel_size=7, out_indices=(0, 1), deploy=True).eval()
    result.load_state_dict(torch.load(convert(path, arguments))['state_dict'])
    image = torch.rand(1, 3, 64, 72)
    with torch.no_grad():
        for out, expected in zip(result(image), source(image)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def changed(key, function):
    return lambda state: {**state, key: function(state[key])}


@pytest.mark.parametrize(
    ('deploy', 'change', 'message'),
    [
        (False, without('block1.1.norm2.bias'), 'are missing (first: block1.1.norm2.bias)'),
        (False, without('block1.0.norm1.weight'), 'are missing (first: block1.0.norm1.weight)'),
        (False, without('block1.1.layer_scale_1'), 'missing (first: block1.1.layer_scale_1)'),
        (False, changed('block2.0.norm1.bias', lambda x: x[1:]), 'found (15,), expected (16,)'),
        (False, changed('norm2.bias', lambda x: x / 0), '1 tensors hold NaN or infinity'),
        (False, changed('norm2.bias', lambda x: x.tolist()), '1 tensors are not of type Tensor'),
        (False, lambda x: {**x, 'block3.0.attn.proj_1.bias': torch.ones(1)}, 'are unexpected'),
        (True, without('block1.1.shortcut'), 'are missing (first: block1.1.shortcut)'),
        (True, without('norm1.bias'), 'are missing (first: norm1.bias)'),
        (True, changed('block2.0.mlp.fc2.weight', lambda x: x[:, 1:]), 'differ in shape'),
    ],
)
def test_a_part_of_a_network_is_refused(convert, tmp_path, deploy, change, message):
    state = small(deploy=deploy, stage_norm_cfg=dict(type='BN')).state_dict()
    torch.save(change(state), tmp_path / 'source.pth')
    assert message in convert(tmp_path / 'source.pth', [])


def test_norms_that_fold_to_nothing_end_in_a_line(convert, tmp_path):
    state = changed('block1.0.norm1.running_var', lambda x: -x)(small().state_dict())
    torch.save(state, tmp_path / 'source.pth')
    assert 'block1.0.norm1 cannot be folded' in convert(tmp_path / 'source.pth', None)


def test_modules_of_a_subclass_stay(convert, tmp_path):
    state = {**small().state_dict(), 'block1.0.mlp.adapter.weight': torch.rand(3),
             'prompt': torch.rand(2)}  # fmt: skip
    path = tmp_path / 'source.pth'
    torch.save(state, path)
    converted = torch.load(convert(path, ['--kernel-size', 7, '--nearest']))['state_dict']
    for key in ('backbone.block1.0.mlp.adapter.weight', 'prompt'):
        assert torch.equal(converted[key], state[key.removeprefix('backbone.')])
