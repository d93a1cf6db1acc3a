"""Export to ONNX, run by ONNX Runtime; graphs of torch's compiler and exporter."""

import copy
import json
import re
from importlib.util import find_spec

import mmcv
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from conftest import (
    REFERENCE,
    ROOT,
    load_tool,
    published,
    reference_error,
    reference_image,
    small,
)

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

    def export(config, checkpoint, backbone=False, **how):
        export_onnx.export(str(ROOT / config), str(checkpoint), path, backbone, (64, 64), **how)

    with pytest.raises(RuntimeError, match='cannot be loaded into the RetinaNet of the config'):
        export(DETECTOR, classifier, backbone=True)
    with pytest.raises(RuntimeError, match='ImageClassifier cannot be exported: '):
        export(CLASSIFIER, classifier, opset=99)
    monkeypatch.setattr(export_onnx, 'TOLERANCE', -1)
    with pytest.raises(
        RuntimeError, match=r'^\(1, 3, 64, 64\) in onnxruntime: The outputs differ'
    ):
        export(CLASSIFIER, classifier)
    assert not list(tmp_path.iterdir())


# --- Whole detectors, by MMDeploy ------------------------------------------------

MMDEPLOY = find_spec('mmdeploy') is not None  # it goes with the original stack


def child(base, head, stages):
    """The text of a config: mmdet's own with our backbone."""
    widths = [(32, 64, 160, 256)[stage] for stage in stages]
    return (
        f"_base_ = 'mmdet::{base}.py'\n"
        "custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)\n"
        f"model = dict(backbone=dict(_delete_=True, type='LSKAVAN', out_indices={stages}), "
        f'neck=dict(in_channels={widths}){head})\n'
    )


def ours(name):
    return f"_base_ = '{ROOT}/configs/detection/{name}.py'\nmodel = {{}}\n"


FOUR, THREE = (0, 1, 2, 3), (1, 2, 3)
SMALL_DINO = (
    'model = dict(num_queries=30, encoder=dict(num_layers=1), decoder=dict(num_layers=2))\n'
)
FEW = 'model["bbox_head"] = dict(num_classes=2)\n'  # fewer pairs with a box than nms_pre
SMALL_SOLO = ', mask_head=dict(num_grids=[12, 10, 8, 6, 5], num_classes=1)'  # 19 GB otherwise
# Head: its config, and the layers whose outputs are spread so that some scores are high.
HEADS = {
    'YOLOX': (child('yolox/yolox_s_8xb8-300e_coco', '', THREE), r'conv_(cls|obj)\.\d'),
    'DINO': (ours('dino-4scale_lska-van-tiny_8xb2-12e_coco') + SMALL_DINO, r'cls_branches\.\d'),
    'RetinaNet': (ours('retinanet_lska-van-tiny_fpn_1x_coco'), 'retina_cls'),
    'ATSS': (ours('atss_lska-van-tiny_fpn_1x_coco') + FEW, 'atss_(cls|centerness)'),
    'GFL': (ours('gfl_lska-van-tiny_fpn_1x_coco'), 'gfl_cls'),
    'FCOS': (
        child('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', '', FOUR) + FEW, 'conv_(cls|centerness)'),
    'RTMDet': (
        child('rtmdet/rtmdet_tiny_8xb32-300e_coco', '', THREE), r'rtm_(cls|reg)\.\d'),
    'Mask R-CNN': (ours('mask-rcnn_lska-van-tiny_fpn_1x_coco'), 'fc_cls'),
    'Cascade Mask R-CNN': (ours('cascade-mask-rcnn_lska-van-tiny_fpn_ms-3x_coco'), 'fc_cls'),
    'SOLOv2': (child('solov2/solov2_r50_fpn_1x_coco', SMALL_SOLO, FOUR), 'mask_head.conv_cls'),
    'TOOD': (child('tood/tood_r50_fpn_1x_coco', '', FOUR), 'tood_cls'),
}  # fmt: skip


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A detector with random weights that are sure of some boxes: config, checkpoint, image."""

    def _detector(head):
        from mmdet.apis import inference_detector

        folder = tmp_path_factory.mktemp('detector')
        paths = [folder / name for name in ('config.py', 'model.pth', 'image.png')]
        text, layers = HEADS[head]
        paths[0].write_text(text)
        image = mmcv.imread(str(ROOT / 'demo/nuclei/image.png'))[:160, 352:]
        mmcv.imwrite(image, str(paths[2]))
        init_default_scope('mmdet')
        cfg = Config.fromfile(paths[0])
        cfg.merge_from_dict({'test_pipeline.1.scale': (160, 160)})
        cfg.model.backbone.init_cfg = None
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
        model.cfg = cfg
        hooks = [
            module.register_forward_hook(spread)
            for name, module in model.named_modules()
            if re.search(f'{layers}$', name)
        ]
        assert hooks
        inference_detector(model.eval(), image)
        torch.save(dict(state_dict=model.state_dict()), paths[1])
        return paths

    return _detector


@torch.no_grad()
def spread(layer, inputs, output):
    """Shift and scale a layer so that of its outputs few are large."""
    if hasattr(layer, 'spread'):
        return output
    layer.spread = True
    # Of distances, of logits of a softmax, of a sigmoid.
    mean, std = (1, 0.3) if output.shape[1] == 4 else (-2.5, 3 if output.ndim == 2 else 1.5)
    layer.weight *= std / output.std()
    layer.bias.sub_(output.mean()).mul_(std / output.std()).add_(mean)
    return layer.forward(*inputs)


@pytest.mark.parametrize(
    'head',
    [pytest.param(head, marks=[] if i < 2 else pytest.mark.soak) for i, head in enumerate(HEADS)],
)
def test_detections_of_an_exported_head(head, detector, tmp_path, capsys, monkeypatch):
    """In the image and in a smaller one."""
    monkeypatch.syspath_prepend(ROOT / 'tools/deployment')
    config, checkpoint, image = map(str, detector(head))
    path = tmp_path / 'model.onnx'
    options = {'test_pipeline.1.scale': (160, 160)}

    def export():
        export_onnx.export(config, checkpoint, path, image=image, options=options)

    if not MMDEPLOY:
        with pytest.raises(ImportError, match='A whole detector is exported by MMDeploy'):
            export()
    elif head == 'TOOD':
        with pytest.raises(
            RuntimeError, match=r'^TOOD cannot be exported: .*DeformConv2dFunction'
        ):
            export()
    else:
        export()
        assert {node.domain for node in onnx.load(path).graph.node} == {''}  # standard operators
        lines = re.findall(r'^image of .* detections of .*', capsys.readouterr().out, re.MULTILINE)
        assert len(lines) == 2
        print(f'{head}:', *lines, sep='\n')
    assert path.exists() == (MMDEPLOY and head != 'TOOD')


def test_a_detector_for_one_size(detector, run, tmp_path):
    config, checkpoint, image = detector('YOLOX')
    path = tmp_path / 'model.onnx'
    command = ('python', 'tools/deployment/export_onnx.py', config, checkpoint, path, '--image',
               image, '--static', '--opset', '16', '--cfg-options',
               'test_pipeline.1.scale=(160,160)')  # fmt: skip
    if not MMDEPLOY:
        *_, last = run(*command, code=1).splitlines()
        assert last.startswith('export_onnx.py: A whole detector is exported by MMDeploy 1.3.1, ')
        return
    assert 'image of 160x160: ' in run(*command)
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 16
    sizes = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 160, 160]
    assert {p.key for p in proto.metadata_props} == {'channels'}  # YOLOX takes 0 to 255


def detections(*rows, masks=None):
    """Of rows (x1, y1, x2, y2, label, score)."""
    rows = torch.tensor(rows).reshape(-1, 6)
    made = InstanceData(bboxes=rows[:, :4], labels=rows[:, 4].long(), scores=rows[:, 5])
    if masks is not None:
        made.masks = masks
    return made


A, B, EMPTY = (0.0, 0, 9, 9, 0, 0.9), (20.0, 0, 29, 9, 1, 0.7), (5.0, 5, 5, 9, 0, 0.8)
POOR, SECOND, MOVED = (*A[:5], 0.3), (*A[:4], 3, 0.6), (2.0, *A[1:])
MASK = torch.zeros(1, 32, 32).bool()
MASK[:, 4:20, 4:20] = True


@pytest.mark.parametrize(
    ('found', 'expected', 'result'),
    [
        ([A, B], [B, A], '2 detections of score 0.50'),
        ([A], [A, B], 'Only PyTorch finds'),
        ([A, B], [A], 'Only ONNX Runtime finds'),
        ([MOVED], [A], 'Only PyTorch finds'),
        ([(*A[:4], 1, 0.9)], [A], 'Only PyTorch finds'),
        ([(*A[:5], 0.89)], [A], 'Only PyTorch finds'),
        ([A, EMPTY], [A], '1 detections of score 0.50'),
        ([A, SECOND], [A], '1 detections of score 0.50'),
        ([A] * 100, [A, B], '1 detections of score 0.90'),  # the graph gives no more
        ([POOR], [POOR], '1 detections of score 0.30'),
        ([(*MOVED[:5], 0.4), POOR], [(*A[:5], 0.4), POOR], 'Only PyTorch finds'),
        ([], [], 'nothing to compare'),
        ([], [A], 'nothing to compare'),
        ([EMPTY], [EMPTY], 'No object is sure enough'),
    ],
)
@pytest.mark.skipif(not MMDEPLOY, reason='compares what only MMDeploy can write')
def test_detections_are_compared_where_both_promise_them(found, expected, result):
    detectors = load_tool('tools/deployment/detectors.py')
    try:
        line = detectors.compare(detections(*found), detections(*expected))
    except RuntimeError as error:
        line = str(error)
    assert re.search(rf'(^|\D){result}', line)


@pytest.mark.skipif(not MMDEPLOY, reason='compares what only MMDeploy can write')
@pytest.mark.parametrize(('shift', 'same'), [(0, True), (1, True), (3, False)])
def test_masks_are_compared_but_for_their_borders(shift, same):
    detectors = load_tool('tools/deployment/detectors.py')
    pair = [detections(A, masks=m) for m in (MASK.roll(shift, 2), MASK)]
    if same:
        assert detectors.compare(*pair).startswith('1 detections')
    else:
        with pytest.raises(RuntimeError, match='masks'):
            detectors.compare(*pair)


def test_norms_that_cannot_be_folded_are_exported_as_they_are(tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT / CLASSIFIER}'\n"
        "model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=8)))\n"
    )
    init_default_scope('mmpretrain')
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    path = tmp_path / 'model.onnx'
    export_onnx.export(str(config), str(tmp_path / 'model.pth'), path, True, (32, 32))
    printed = capsys.readouterr().out
    assert 'not folded: patch_embed1.norm cannot be folded: it is GroupNorm' in printed
    assert path.exists()


# --- torch's own graphs --------------------------------------------------------


@pytest.mark.soak  # the compiler takes minutes
def test_gradients_compile_for_varying_sizes():
    backbone = small().train()
    run = torch.compile(copy.deepcopy(backbone), dynamic=True, fullgraph=True)
    for side in (64, 96):
        image, gradients = torch.rand(2, 3, side, side + 32), []
        for model in (backbone, run):
            model.zero_grad()
            sum(out.square().mean() for out in model(image)).backward()
            gradients.append([p.grad for p in model.parameters()])
        largest = max(gradient.abs().max() for gradient in gradients[0])
        for one, other in zip(*gradients, strict=True):
            assert (one - other).abs().max() <= 1e-3 * largest


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


@pytest.mark.soak  # the compiler takes half a minute; tests/gpu has the graphs without it
def test_compiled_training_step():
    """Gradients as without the compiler; sizes are fixed, see docs/performance.md."""
    image, grads = torch.rand(2, 3, 64, 64), []
    for compile_ in (False, True):
        backbone = small(with_cp=compile_).train()
        run = torch.compile(backbone, dynamic=False) if compile_ else backbone
        sum(out.square().mean() for out in run(image)).backward()
        grads.append([parameter.grad for parameter in backbone.parameters()])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.soak  # the compiler takes half a minute; tests/gpu has the graphs without it
def test_compile_key_of_a_config(run, nuclei, tmp_path):
    """MMEngine's `compile`: a small segmentor trains and is tested as without it."""
    (tmp_path / 'small.py').write_text(
        f"_base_ = '{ROOT}/demo/lska-van-tiny_fpn_nuclei.py'\n"
        'model = dict(\n'
        '    backbone=dict(arch=dict(_delete_=True, embed_dims=[8], depths=[1],\n'
        '                            ffn_ratios=[2]), out_indices=(0,)),\n'
        '    neck=dict(in_channels=[8], out_channels=8, num_outs=1),\n'
        '    decode_head=dict(in_channels=[8], in_index=[0], feature_strides=[4], channels=8,\n'
        '                     dropout_ratio=0))\n'
        'train_cfg = dict(max_iters=2, val_interval=2)\n'
        'default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))\n'
        f"train_dataloader = dict(batch_size=2, dataset=dict(data_root='{nuclei}/ade'))\n"
        f"val_dataloader = test_dataloader = dict(dataset=dict(data_root='{nuclei}/ade'))\n"
    )
    logs = []
    for name, options in (
        ('plain', []),
        ('compiled', ['--cfg-options', 'compile.backend=aot_eager']),
    ):
        out = tmp_path / name
        run('python', 'tools/train.py', tmp_path / 'small.py', '--work-dir', out, *options)
        lines = next(out.glob('*/vis_data/scalars.json')).read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for plain, compiled in zip(*logs):
        for key in {'loss', 'mIoU'} & set(plain):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-3), key
    assert [record.get('step') for record in logs[0]] == [1, 2, 2]


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


# --- Other backbones ---------------------------------------------------------------

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


@pytest.fixture
def gated(tmp_path):
    """A ResNet with gates, in a config and a checkpoint."""
    path = tmp_path / 'gated.py'
    path.write_text(GATED)
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'gated.pth')
    return path, tmp_path / 'gated.pth'


def test_a_resnet_with_gates_is_exported(gated, run, tmp_path):
    out = tmp_path / 'gated.onnx'
    command = ('python', 'tools/deployment/export_onnx.py', *gated, out, '--backbone')
    printed = run(*command, '--size', '64x64')
    assert 'not folded: ' in printed
    assert f'written to {out}' in printed
