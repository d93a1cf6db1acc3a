"""Export to ONNX, run by ONNX Runtime; graphs of torch's compiler and exporter.

Whole detectors are in test_mmdeploy.py.
"""

import copy
import json
from pathlib import Path

import mmcv
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from conftest import REFERENCE, ROOT, load_tool, published, reference_error, reference_image, small

export_onnx = load_tool('tools/deployment/export_onnx.py')

DETECTOR = 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
CLASSIFIER = 'configs/classification/lska-van-tiny_4xb128_in1k.py'
FPN = 'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'
UPERNET = 'configs/segmentation/lska-van-tiny_upernet_8xb2-160k_ade20k-512x512.py'


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {'images': np.asarray(images)})


@pytest.fixture(scope='module')
def checkpoint(published_file, tmp_path_factory):
    """Save a config's model with the reference weights in its backbone."""

    def _checkpoint(config):
        cfg = Config.fromfile(ROOT / config)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(published_file))
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        path = tmp_path_factory.mktemp('export') / 'model.pth'
        torch.save(dict(state_dict=model.state_dict()), path)
        return path

    return _checkpoint


def test_backbone_of_a_detector(checkpoint, run, tmp_path):
    path = tmp_path / 'out/backbone.onnx'
    printed = run(
        'python', 'tools/deployment/export_onnx.py', DETECTOR, checkpoint(DETECTOR), path,
        '--backbone', '--size', '64x96',
    )  # fmt: skip
    assert '(1, 3, 64, 96) in onnxruntime: largest difference ' in printed
    assert '(2, 3, 96, 160) in onnxruntime: largest difference ' in printed
    assert [file.name for file in path.parent.iterdir()] == ['backbone.onnx']
    outputs = run_onnx(path, reference_image())
    for i, output in enumerate(outputs, start=1):
        difference = np.abs(output[:, ::8] - REFERENCE[f'tiny-k23-96/stage{i}']).max()
        print(f'ONNX Runtime, stage {i}: largest difference {difference:.1e}')
        assert difference <= 1e-5
    props = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}
    assert props == dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], channels='RGB'
    )


@pytest.mark.parametrize(
    ('config', 'shape'),
    [(CLASSIFIER, (1000,)), (FPN, (150, 75, 94)), (UPERNET, (150, 75, 94))],
    ids=['classifier', 'fpn', 'upernet'],
)
def test_whole_models(config, shape, checkpoint, tmp_path, capsys):
    """At a third size too: 3 images of 75 x 94."""
    path = tmp_path / 'model.onnx'
    export_onnx.export(str(ROOT / config), str(checkpoint(config)), path, False, (64, 64))
    print(capsys.readouterr().out)
    (logits,) = run_onnx(path, torch.rand(3, 3, 75, 94))
    assert logits.shape == (3, *shape)


OCRNET = """
_base_ = '{}'
part = dict(in_channels=256, in_index=3, channels=16, num_classes=150, norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss'))
model = dict(type='CascadeEncoderDecoder', num_stages=2, auxiliary_head=None, decode_head=[
    dict(type='FCNHead', num_convs=1, **part), dict(type='OCRHead', ocr_channels=16, **part)])
"""


def test_a_segmentor_for_one_size(checkpoint, tmp_path):
    """Of a head in two stages, from an image."""
    config, path, image = (tmp_path / name for name in ('ocrnet.py', 'model.onnx', 'image.png'))
    config.write_text(OCRNET.format(ROOT / UPERNET))
    mmcv.imwrite(mmcv.imread(str(ROOT / 'demo/nuclei/image.png'))[:64, :96], str(image))
    export_onnx.export(
        str(config), str(checkpoint(config)), path, image=str(image), static=True, opset=16
    )
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 16
    for value, sizes in ((proto.graph.input, [1, 3]), (proto.graph.output, [1, 150])):
        assert [d.dim_value for d in value[0].type.tensor_type.shape.dim] == [*sizes, 64, 96]


def test_adaptive_pooling_as_products_of_matrices():
    x = torch.rand(2, 3, 13, 29, dtype=torch.float64)
    for cells in ((1, 1), (2, 2), (3, 5), (6, 6), (13, 29)):
        expected = torch.nn.functional.adaptive_avg_pool2d(x, cells)
        torch.testing.assert_close(export_onnx.AdaptiveAvgPool(cells)(x), expected)


def test_what_cannot_be_exported(checkpoint, monkeypatch, tmp_path):
    classifier = checkpoint(CLASSIFIER)
    path = tmp_path / 'model.onnx'

    def export(**how):
        config = str(ROOT / CLASSIFIER)
        export_onnx.export(config, str(classifier), path, image_size=(64, 64), **how)

    with pytest.raises(RuntimeError, match='ImageClassifier cannot be exported: '):
        export(opset=99)
    monkeypatch.setattr(export_onnx, 'TOLERANCE', -1)
    with pytest.raises(
        RuntimeError, match=r'^\(1, 3, 64, 64\) in onnxruntime: The outputs differ'
    ):
        export()
    assert not list(tmp_path.iterdir())


GROUP_NORMS = f"""
_base_ = '{ROOT / CLASSIFIER}'
model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=8)))
"""
GATED = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
gate = dict(cfg=dict(type='LSKA', kernel_size=11), position='after_conv3')
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdet.ResNet', depth=50, stem_channels=8, base_channels=8, plugins=[gate]),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=256))
"""


@pytest.mark.parametrize(
    ('text', 'reason'),
    [(GROUP_NORMS, 'patch_embed1.norm cannot be folded: it is GroupNorm'), (GATED, '')],
    ids=['group_norms', 'resnet_with_gates'],
)
def test_what_cannot_be_folded_is_exported_as_it_is(text, reason, tmp_path, capsys):
    config, checkpoint, path = (str(tmp_path / f'model.{end}') for end in ('py', 'pth', 'onnx'))
    Path(config).write_text(text)
    init_default_scope('mmpretrain')
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    export_onnx.export(config, checkpoint, Path(path), backbone=True, image_size=(32, 32))
    assert f'not folded: {reason}' in capsys.readouterr().out
    assert onnx.load(path).graph.node


# --- torch's own graphs --------------------------------------------------------


@pytest.mark.soak  # the compiler takes half a minute; tests/gpu has the graphs without it
@pytest.mark.parametrize('deploy', [False, True], ids=['default', 'deployed'])
def test_compiles_as_one_graph(deploy):
    """The first stage of the published network: to compile all takes minutes."""
    backbone, image = published(out_indices=(0,)), reference_image()
    if deploy:
        backbone.switch_to_deploy()
    compiled = torch.compile(backbone, fullgraph=True)
    with torch.no_grad():
        difference = reference_error(compiled(image))
    print(f'tiny k=23 compiled, deploy={deploy}: largest difference {difference:.1e}')
    assert difference <= 1e-5


@pytest.mark.soak  # the compiler takes minutes
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_training(dynamic):
    """Gradients as without the compiler; where sizes are fixed, of branches computed again."""
    backbone = small(with_cp=not dynamic).train()
    run = torch.compile(copy.deepcopy(backbone), dynamic=dynamic, fullgraph=dynamic)
    for side in (64, 96) if dynamic else (64,):
        image, gradients = torch.rand(2, 3, side, side + 32), []
        for model in (backbone, run):
            model.zero_grad()
            sum(out.square().mean() for out in model(image)).backward()
            gradients.append([p.grad for p in model.parameters()])
        largest = max(gradient.abs().max() for gradient in gradients[0])
        for one, other in zip(*gradients, strict=True):
            assert (one - other).abs().max() <= 1e-3 * largest


@pytest.mark.parametrize('deploy', [False, True], ids=['default', 'deployed'])
def test_exports_with_dynamic_batch_and_size(deploy):
    backbone, image = published(), reference_image()
    if deploy:
        backbone.switch_to_deploy()
    if hasattr(torch.export, 'Dim'):
        example = torch.rand(3, 3, 64, 128)
        sizes = {
            i: torch.export.Dim(name, min=least)
            for i, name, least in ((0, 'b', 1), (2, 'h', 33), (3, 'w', 33))
        }
        program = torch.export.export(backbone, (example,), dynamic_shapes=(sizes,))
    else:  # torch 2.1 has another way to say it
        program = torch.export.export(backbone, (image,))
    with torch.no_grad():
        difference = reference_error(program.module()(image))
    print(f'tiny k=23 exported, deploy={deploy}: largest difference {difference:.1e}')
    assert difference <= 1e-5
