"""Whole detectors in ONNX, which MMDeploy exports."""

import copy
import re
from importlib.util import find_spec

import mmcv
import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from conftest import ROOT, load_tool

export_onnx = load_tool('tools/deployment/export_onnx.py')

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
