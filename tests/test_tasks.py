"""Classification and segmentation, end to end and through the stock tools."""

import json
import re
import shutil
from pathlib import Path

import mmcv
import mmseg
import numpy as np
import openvino
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from conftest import ROOT, written_file

DIGITS = 'demo/lska-van-tiny_digits.py'
NUCLEI = 'demo/lska-van-tiny_fpn_nuclei.py'


@pytest.fixture(scope='module')
def classifier(train_demo):
    return train_demo(
        'classification', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=16',
        'param_scheduler.0.start_factor=1',
    )  # fmt: skip


@pytest.fixture(scope='module')
def segmentor(train_demo):
    return train_demo(
        'segmentation', 'train_cfg.max_iters=20', 'train_cfg.val_interval=10',
        'default_hooks.checkpoint.interval=20', 'param_scheduler.0.end=20',
    )  # fmt: skip


def last_checkpoint(demo):
    return (demo[0] / 'last_checkpoint').read_text()


@pytest.mark.parametrize(
    ('demo', 'metric', 'floor'), [('classifier', 'top-1 accuracy', 50), ('segmentor', 'mIoU', 50)]
)
def test_demo_ends_with_its_metric_and_pictures(demo, metric, floor, request):
    out, printed = request.getfixturevalue(demo)
    assert float(re.search(rf'^{metric}: ([\d.]+)$', printed, re.MULTILINE)[1]) > floor
    for name in ('prediction.png', 'training_curve.png'):
        assert f': {out / name}' in printed
        assert min(mmcv.imread(str(out / name)).shape[:2]) > 400


def test_unknown_task(run):
    printed = run('bash', 'demo/run.sh', code=2, TASK='tracking')
    assert 'one of: detection segmentation classification' in printed


# --- One checkpoint, three tasks -------------------------------------------------


def test_classifier_starts_the_other_two_by_its_path(classifier):
    checkpoint = str(next(classifier[0].glob('*.pth')))
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    for config in (
        'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py',
        'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py',
    ):
        cfg = Config.fromfile(ROOT / config)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg.checkpoint = checkpoint
        model = MODELS.build(cfg.model)
        model.init_weights()
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, state[f'backbone.{name}'])


# --- Inference -------------------------------------------------------------------


def test_segmentation_inferencer(segmentor, tmp_path):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(ROOT / NUCLEI), last_checkpoint(segmentor), device='cpu')
    image = mmcv.imread(str(ROOT / 'demo/nuclei/image.png'))[:96, :128]
    result = inferencer(image, out_dir=str(tmp_path))
    assert result['predictions'].shape == (96, 128)
    assert set(result['predictions'].flat) == {0, 1}  # background and nuclei
    assert list(tmp_path.glob('vis/*'))


def test_deployed_checkpoint_has_the_same_metric(segmentor, run, tmp_path):
    tool, target = 'tools/model_converters/reparameterize_model.py', tmp_path / 'deployed.pth'
    deployed = written_file(run('python', tool, last_checkpoint(segmentor), target))
    printed = run('python', 'tools/test.py', NUCLEI, deployed, '--work-dir', tmp_path,
                  '--cfg-options', 'model.backbone.deploy=True')  # fmt: skip
    before = re.search(r'^mIoU: ([\d.]+)$', segmentor[1], re.MULTILINE)[1]
    assert float(re.search(r'mIoU: ([\d.]+)', printed)[1]) == pytest.approx(
        float(before), abs=0.01
    )


def test_engines_keep_the_metric(classifier, run, tmp_path):
    """That of the exported file is PyTorch's; in 8 bits and in bfloat16 it is within a point."""
    exported, quantized = tmp_path / 'exported.onnx', tmp_path / 'quantized.onnx'
    tools, checkpoint = 'tools/deployment', last_checkpoint(classifier)
    run('python', f'{tools}/export_onnx.py', DIGITS, checkpoint, exported, '--size', '64x64')
    printed = run('python', f'{tools}/quantize.py', DIGITS, exported, quantized)
    before, after = map(float, re.search(r'([\d.]+) MiB, now ([\d.]+) MiB', printed).groups())
    assert after < 0.4 * before
    metric = float(re.search(r'^top-1 accuracy: ([\d.]+)$', classifier[1], re.MULTILINE)[1])
    able = openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
    for file, engine, precision, tolerance in (
        (exported, 'onnxruntime', 'f32', 0.01),
        (exported, 'openvino', 'bf16' if 'BF16' in able else 'f32', 1),
        (quantized, 'onnxruntime', 'f32', 1),
        (quantized, 'openvino', 'f32', 1),
    ):
        printed = run('python', f'{tools}/test.py', DIGITS, file, '--work-dir', tmp_path,
                      '--engine', engine, '--precision', precision)  # fmt: skip
        found = float(re.search(r'accuracy/top1: ([\d.]+)', printed)[1])
        assert found == pytest.approx(metric, abs=tolerance)
    printed = run('python', f'{tools}/quantize.py', DIGITS, quantized, quantized, code=1)
    assert printed.endswith('is the file to quantize; choose another output file.\n')
    other = tmp_path / 'other.onnx'
    printed = run('python', f'{tools}/quantize.py', DIGITS, quantized, other, code=1)
    assert printed.endswith('quantized.onnx is quantized already.\n')
    run('python', f'{tools}/export_onnx.py', DIGITS, checkpoint, other, '--backbone')
    printed = run('python', f'{tools}/test.py', DIGITS, other, code=1)
    assert printed.endswith('other.onnx has the outputs stage4, expected logits.\n')


def test_every_image_is_drawn(segmentor, classifier, run, tmp_path):
    """Into the folder itself, where names repeat from class to class, too; in a readable size."""
    for config, demo, count in ((NUCLEI, segmentor, 1), (DIGITS, classifier, 355)):
        folder = tmp_path / demo[0].name
        printed = run('python', 'tools/test.py', config, last_checkpoint(demo), '--work-dir',
                      tmp_path, '--show-dir', folder)  # fmt: skip
        assert printed.splitlines()[-1] == f'images with the predictions are in {folder}'
        pictures = list(folder.glob('*.png'))
        assert len(pictures) == len(list(folder.iterdir())) == count
        assert min(mmcv.imread(str(pictures[0])).shape[:2]) >= 150


def test_images_without_a_path_are_drawn(classifier, run, tmp_path):
    """As those of CIFAR-10, which the data set holds itself; with mmpretrain's own arguments."""
    metrics = tmp_path / 'metrics.json'
    run('python', 'tools/test.py', DIGITS, last_checkpoint(classifier), '--work-dir', tmp_path,
        '--show-dir', tmp_path / 'shown', '--interval', 2, '--out', metrics, '--out-item',
        'metrics', '--amp', '--cfg-options', 'test_dataloader.dataset.indices=3',
        'test_dataloader.dataset.pipeline.2.meta_keys=[ori_shape]')  # fmt: skip
    names = sorted(path.name for path in (tmp_path / 'shown').iterdir())
    assert names == ['image_1.png', 'image_2.png']
    assert 'accuracy/top1' in json.loads(metrics.read_text())


# --- What goes wrong ---------------------------------------------------------------


def test_labels_beyond_the_classes(segmentor, nuclei, run, tmp_path):
    """The nuclei as class 3 of 2, through the real Runner."""
    shutil.copytree(f'{nuclei}/ade', tmp_path / 'ade')
    for path in tmp_path.glob('ade/annotations/*/nuclei.png'):
        labels = mmcv.imread(str(path), flag='unchanged')
        mmcv.imwrite(np.where(labels == 2, 3, labels), str(path))
    for split, command in (
        ('train', ['train.py', NUCLEI]),
        ('test', ['test.py', NUCLEI, last_checkpoint(segmentor)]),
    ):
        printed = run(
            'python', f'tools/{command[0]}', *command[1:], '--work-dir', tmp_path,
            '--cfg-options', f'{split}_dataloader.dataset.data_root={tmp_path}/ade', code=1,
        )  # fmt: skip
        assert re.search(r'annotations/(training|validation)/nuclei\.png has the labels', printed)
        assert 'the model has 2 classes: valid labels are 0 to 1, 255 for no class' in printed


def test_flexible_runner_tests(segmentor, run, tmp_path):
    """It builds its model after the tool could look at it; MMEngine would test a random head."""
    command = ['python', 'tools/test.py', NUCLEI, last_checkpoint(segmentor)]
    command += ['--work-dir', tmp_path, '--cfg-options', 'runner_type=FlexibleRunner']
    assert 'mIoU' in run(*command)
    assert 'size mismatch for' in run(*command, 'model.decode_head.num_classes=3', code=1)


# --- mmseg's own tool ---------------------------------------------------------------


@pytest.mark.skipif(mmseg.__version__ == '1.2.2', reason='it fails there for every config')
def test_get_flops_of_mmseg(run):
    """Those of mmdet and mmpretrain are in docs/."""
    tool = Path(mmseg.__file__).parent / '.mim/tools/analysis_tools/get_flops.py'
    config = 'configs/segmentation/lska-van-tiny_fpn_4xb4-80k_ade20k-512x512.py'
    assert 'Params: 7.908M' in run('python', tool, config, '--shape', '512')
