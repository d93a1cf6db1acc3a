"""What the pictures show, against closed forms; and how they are made."""

import math
import re
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch import nn

from conftest import ROOT, SMALL, load_tool, small

ERF, ATTENTION = 'tools/visualization/erf.py', 'tools/visualization/attention.py'
erf, attention = map(load_tool, (ERF, ATTENTION))
load_backbone = load_tool('tools/visualization/backbones.py').load_backbone
CONFIG = f"""
default_scope = 'mmpretrain'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='LSKAVAN', arch={SMALL!r}, kernel_size=11, out_indices=(0, 1)))
"""
RESNET = "default_scope = 'mmpretrain'\nmodel = dict(backbone=dict(type='ResNet', depth=18))\n"


@pytest.fixture
def files(tmp_path):
    """A folder with images, two configs, and the checkpoint of one."""
    (tmp_path / 'small_k11.py').write_text(CONFIG)
    (tmp_path / 'resnet.py').write_text(RESNET)
    state = {f'backbone.{key}': value for key, value in small().state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'small.pth')
    photo = mmcv.imread(str(ROOT / 'demo/nuclei/image.png'))
    for name in ('a/1.png', 'b/2.jpg'):
        mmcv.imwrite(photo[:200], str(tmp_path / f'images/{name}'))
    return tmp_path


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn last, as a function."""
    close = erf.plt.close
    monkeypatch.setattr(erf.plt, 'close', lambda figure: None)
    yield erf.plt.gcf
    close('all')


def is_picture(path):
    return min(mmcv.imread(str(path)).shape[:2]) > 200


def test_averaged_weights_are_taken_and_named(files):
    """Those that MMEngine's hook averaged."""
    model = nn.ModuleDict(dict(backbone=small()))
    hook, runner = EMAHook(momentum=0.5), SimpleNamespace(model=model, iter=0)
    hook.before_run(runner)
    for _ in range(2):  # the first one copies
        hook.after_train_iter(runner, 0)
        nn.init.constant_(model.backbone.norm1.bias, 8)
    checkpoint = dict(state_dict=model.state_dict())
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, files / 'ema.pth')
    config = Config.fromfile(files / 'small_k11.py')
    backbone, weights = load_backbone(config, str(files / 'ema.pth'))
    assert weights == 'backbone of ema.pth, averaged weights (EMA)'
    assert (backbone.norm1.bias == 4).all()  # between 0 and 8


@pytest.mark.parametrize('tool', [ATTENTION, ERF])
def test_the_backbone_of_another_model_is_named(main, files, figure, tool):
    """In the table and in the title."""
    content = torch.load(files / 'small.pth')
    content['state_dict']['rpn_head.rpn_conv.weight'] = torch.zeros(1)
    torch.save(content, files / 'detector.pth')
    config, image, out = files / 'small_k11.py', files / 'images/a/1.png', files / 'out.png'
    words = [config, files / 'detector.pth']
    if tool is ATTENTION:
        pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
        data = f'test_dataloader = dict(dataset=dict(pipeline={pipeline}))\n'
        config.write_text(config.read_text() + data)
        words.append(image)
    else:
        words = ['--model', *words, '--images', image.parent, '--size', '32x32']
    code, printed = main(tool, *words, '--out', out)
    assert code == 0, printed
    assert 'backbone of detector.pth' in printed
    title = figure().get_suptitle() or figure().axes[0].get_title()
    assert 'small_k11' in title
    assert 'backbone of detector.pth' in title


@pytest.mark.parametrize(('bands', 'color_type'), [(1, 'grayscale'), (4, 'unchanged')])
@pytest.mark.parametrize('tool', [ATTENTION, ERF])
def test_images_of_other_bands(main, files, figure, tool, bands, color_type):
    """Loaded and normalized as the config says, and painted as their mean."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    image, config, out = files / 'bands/1.png', files / 'bands.py', files / 'out.png'
    mmcv.imwrite(pixels, str(image))
    load = dict(type='LoadImageFromFile', color_type=color_type)
    norm = dict(type='Normalize', mean=[100.0] * bands, std=[50.0] * bands, to_rgb=False)
    pipeline = [load, norm, dict(type='PackInputs')]
    text = CONFIG.replace('kernel_size=11', f'kernel_size=11, in_channels={bands}')
    text = re.sub('data_preprocessor = .*', '', text)
    config.write_text(f'{text}test_dataloader = dict(dataset=dict(pipeline={pipeline}))\n')
    state = small(in_channels=bands).state_dict()
    torch.save({f'backbone.{key}': value for key, value in state.items()}, files / 'bands.pth')
    words = [config, files / 'bands.pth', '--out', out]
    if tool is ERF:
        code, printed = main(ERF, '--model', *words, '--images', image.parent, '--size', '32x32')
    else:
        code, printed = main(ATTENTION, *words[:2], image, *words[2:])
    assert code == 0, printed
    assert is_picture(out)
    if tool is ATTENTION:
        painted = figure().axes[0].images[0].get_array()
        expected = mmcv.imread(str(image), color_type).reshape(64, 64, -1)
        assert np.allclose(painted, (expected.mean(2) - 100) / 50, atol=1e-4)


# --- Effective receptive field -----------------------------------------------------


def test_field_of_a_convolution_is_its_kernel():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 1, (5, 7), padding=(2, 3))
    nn.init.constant_(conv.bias, 10)  # no output is negative
    field = erf.effective_receptive_field(conv, torch.rand(3, 2, 15, 15))
    expected = torch.zeros(15, 15).double()
    expected[5:10, 4:11] = conv.weight[0].detach().relu().sum(0)
    torch.testing.assert_close(field, expected)


def test_negative_outputs_do_not_count():
    conv = nn.Conv2d(1, 2, 3, padding=1)
    nn.init.ones_(conv.weight)
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([0.0, -100.0]))
    assert erf.effective_receptive_field(conv, torch.ones(1, 1, 5, 5)).sum() == 9


def test_squares_of_a_box():
    """The square of side s holds (s / k)^2 of a box of side k."""
    k, size, shares = 31, 64, (0.2, 0.5, 0.99, 1)
    field = torch.zeros(size, size)
    field[size // 2 - k // 2 : size // 2 + k // 2 + 1, 32 - 15 : 32 + 16] = 0.3
    odd = range(1, k + 1, 2)
    sides = [next(s for s in odd if s >= k * math.sqrt(share)) for share in shares]
    assert sides == [15, 23, 31, 31]
    assert erf.contribution_squares(field, shares) == [(s, (s / size) ** 2) for s in sides]
    for shape, side in (((8, 8), 8), ((5, 11), 11)):  # they end with the image
        assert erf.contribution_squares(torch.ones(shape), [1]) == [(side, 1)]
    with pytest.raises(ValueError, match='sum to 0, expected a positive number'):
        erf.contribution_squares(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ('size', 'cells', 'stride'),
    [(256, 8, 32), (240, 8, 32), (58, 2, 32), (200, 7, 32), (200, 6, 32), (224, 16, 14)],
)
def test_stride_of_a_map_whose_size_was_rounded(size, cells, stride):
    assert erf._stride(size, cells) == stride


def test_what_returns_no_map_is_refused():
    with pytest.raises(ValueError, match=r'The Flatten returns \(1, 12\), expected a map'):
        erf.effective_receptive_field(nn.Flatten(), torch.rand(1, 3, 2, 2))


def test_erf_of_several_models(main, files):
    config, out = files / 'small_k11.py', files / 'out/erf.png'
    models = ['--model', config, files / 'small.pth', '--model', files / 'resnet.py']
    more = ['--images', files / 'images', '--size', '64x64', '--out', out]
    code, printed = main(ERF, *models, *more)
    assert code == 0, printed
    assert '2 images of' in printed
    assert '| small_k11 | 11 | backbone of small.pth |' in printed
    assert '| resnet |  | random weights |' in printed
    assert is_picture(out)

    paths = erf.find_images(files / 'images', 9)
    cfg = Config.fromfile(config)
    images = torch.stack([erf.read_center(cfg, path, (64, 64)) for path in paths])
    square, _, _ = erf.contribution_squares(  # the weights of the checkpoint, not others
        erf.effective_receptive_field(small().eval(), images / 127.5 - 1)
    )
    assert f'| backbone of small.pth | {square.side} ({square.area:.1%}) |' in printed


def test_erf_of_several_kernel_sizes(main, files):
    code, printed = main(
        ERF, '--model', files / 'small_k11.py', '--kernel-sizes', 7, 11, '--num-images', 1,
        '--images', files / 'images', '--size', '32x32', '--out', files / 'erf.png',
        '--cfg-options', 'model.backbone.attention=LKA',
    )  # fmt: skip
    assert code == 0, printed
    assert printed.count('| random weights |') == 2
    assert '| small_k11 | 7 |' in printed
    assert is_picture(files / 'erf.png')


def test_kernel_sizes_of_the_gates_of_any_backbone():
    from mmdet.models import ResNet

    plugin = dict(cfg=dict(type='LSKA', kernel_size=23), position='after_conv2')
    assert erf.kernel_sizes(ResNet(50, base_channels=4, plugins=[plugin])) == '23'
    assert erf.kernel_sizes(ResNet(50, base_channels=4)) == ''
    assert erf.kernel_sizes(small(kernel_size=[23, 7])) == '23, 7'


@pytest.mark.parametrize('side', [5, 31])
def test_a_narrow_field_is_drawn_enlarged_too(side, figure, tmp_path):
    field = torch.zeros(64, 64)
    start = 32 - side // 2
    field[start : start + side, start : start + side] = 1
    squares = erf.contribution_squares(field)
    erf.plot([erf.Field('net', '7', 'random weights', field, squares)], tmp_path / 'erf.png')
    panel = figure().axes[0]
    assert panel.get_xlim()[1] > 32  # a margin around the image
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == [f'{share:.0%} in {s}' for share, (s, _) in zip(erf.SHARES, squares)]
    notes = [text.get_text() for text in panel.texts]
    assert len(panel.child_axes) == len(notes) == (side == 5)
    if notes:
        assert 'narrow' in notes[0]
        assert side <= 2 * panel.child_axes[0].get_xlim()[1] < 2 * side


# --- Gates -------------------------------------------------------------------------


@pytest.mark.parametrize('deploy', [False, True])
def test_gate_maps_are_the_factors(deploy):
    """Though without gradients the product overwrites the factor."""
    backbone, image, inputs = small().eval(), torch.rand(1, 3, 64, 96), []
    if deploy:
        backbone.switch_to_deploy()
    gates = [block[-1].attn.spatial_gating_unit for block in (backbone.block1, backbone.block2)]
    for gate in gates:
        gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    maps = attention.gate_maps(backbone, image)
    assert [(m.stage, m.block, m.kernel_size) for m in maps] == [(0, 1, 11), (1, 0, 11)]
    for gate, x, (*_, factor) in zip(gates, inputs, maps):
        expected = nn.Sequential(*gate.children())(x).abs().mean(1)[0]
        torch.testing.assert_close(factor, expected.detach())
    assert not any(gate.conv1._forward_hooks for gate in gates)


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(ValueError, match='Stage 1 has blocks 0 to 0, not 1'):
        attention.gate_maps(small().eval(), torch.rand(1, 3, 32, 32), 1)


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py', '192 x 192'),
        ('demo/lska-van-tiny_fpn_nuclei.py', '128 x 128'),
        ('demo/lska-van-tiny_digits.py', '16 x 16'),
    ],
)
def test_attention_in_three_tasks(main, published_file, tmp_path, config, size):
    """At the size that the config's pipeline gives the image."""
    out = tmp_path / 'out/attention.png'
    image = ROOT / 'demo/nuclei/image.png'
    code, printed = main(ATTENTION, ROOT / config, published_file, image, '--out', out)
    assert code == 0, printed
    assert f'| 0 | 2 | 23 | {size} |' in printed
    assert '| 3 | 1 | 23 |' in printed
    assert is_picture(out)


def test_wide_images_are_drawn_one_above_the_other(tmp_path):
    gates = [attention.GateMap(stage, 0, 7, torch.rand(4, 16)) for stage in (1, 2)]
    attention.plot(torch.zeros(3, 64, 256), gates, 'a title', tmp_path / 'wide.png')
    height, width = mmcv.imread(str(tmp_path / 'wide.png')).shape[:2]
    assert 0.5 < height / width < 1.2


def test_each_stage_has_its_own_scale(figure, tmp_path):
    """And the colors of its bar, which nothing is blended into."""
    factors = [scale * torch.linspace(1, spread, 256).view(16, 16)
               for scale, spread in ((1, 9), (50, 1.01))]  # fmt: skip
    gates = [attention.GateMap(i, 0, 7, factor) for i, factor in enumerate(factors)]
    attention.plot(torch.zeros(3, 64, 64), gates, 'a title', tmp_path / 'out.png')
    assert figure().get_suptitle() == 'a title'
    image, *panels = figure().axes
    assert not image.images[0].colorbar
    for factor, panel in zip(factors, panels):
        (drawn,) = panel.images
        relative = factor / factor.mean()
        assert torch.equal(torch.as_tensor(drawn.get_array()), relative)
        assert drawn.get_alpha() is None
        assert drawn.norm.vmin == pytest.approx(relative.min(), rel=0.05)
        assert drawn.norm.vmax == pytest.approx(relative.max(), rel=0.05)
        assert drawn.colorbar is not None
