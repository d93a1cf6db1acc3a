"""Set-ups that users reported: what the toolboxes' own tools take, ours take.

Each is trained, tested, and resumed by tools/train.py and tools/test.py, on small data that
are made here.
"""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

BASE = "_base_ = './base.py'\n"
MODULES = "custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)\n"
UNTESTED = (
    'val_dataloader = val_cfg = val_evaluator = None\n'
    'test_dataloader = test_cfg = test_evaluator = None\n'
)
CLASSIFIER = """\
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
arch = dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4)
backbone = dict(type='LSKAVAN', kernel_size=7, arch=arch)
data_preprocessor = dict(num_classes=2)
model = dict(
    type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32, topk=(1,)))
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
data = dict(type='CustomDataset', data_root='classes', pipeline=pipeline)
sampler = dict(type='DefaultSampler', shuffle=True)
train_dataloader = dict(batch_size=4, num_workers=1, sampler=sampler, dataset=data)
test_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data)
test_evaluator = dict(type='Accuracy', topk=(1,))
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
"""
SEGMENTOR = """\
default_scope = 'mmseg'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='CheckLabelsHook')]
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
data = dict(
    type='BaseSegDataset', data_root='.', img_suffix='.png', seg_map_suffix='.png',
    data_prefix=dict(img_path='img', seg_map_path='binary'), pipeline=pipeline,
    metainfo=dict(classes=('no', 'yes'), palette=[[0, 0, 0], [9, 9, 9]]))
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler'), dataset=data)
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
test_cfg = dict(type='TestLoop')
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=4, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96), seg_pad_val=255),
    backbone=dict(
        type='LSKAVAN', kernel_size=7,
        arch=dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4)),
    decode_head=dict(
        type='FCNHead', in_channels=32, channels=8, num_convs=1, concat_input=False, num_classes=2,
        out_channels=1, threshold=0.3, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""
SCHEDULERS = dict(
    ConstantLR='factor=0.5, end=2, by_epoch=False',
    CosineAnnealingLR='T_max=8, by_epoch=False',
    CosineRestartLR='periods=[2, 6], restart_weights=[1, 1], eta_min=0, by_epoch=False',
    ExponentialLR='gamma=0.9, by_epoch=False',
    LinearLR='start_factor=0.1, end=4, by_epoch=False',
    MultiStepLR='milestones=[2, 3], by_epoch=False',
    OneCycleLR='eta_max=1e-3, total_steps=8, by_epoch=False',
    PolyLR='eta_min=0, end=8, by_epoch=False',
    StepLR='step_size=2, by_epoch=False',
    ReduceOnPlateauLR="monitor='loss', by_epoch=True",
    CosineAnnealingMomentum='T_max=8, by_epoch=False',
    ReduceOnPlateauMomentum="monitor='loss', by_epoch=True",
)

# Configs, by name. Those in tests/setups are of files that users sent.
CONFIGS = {
    'base': None,
    'sub': None,  # a backbone with a layer of its own
    'meta': None,  # a dict within metainfo
    'semi': None,  # half of a batch without annotations; no backbone at the model's top
    'tif': None,  # four bands of float32
    'npy': BASE + MODULES + (
        "load = dict(type='LoadBands')\n"
        "train_dataloader = dict(dataset=dict(\n"
        "    ann_file='npy.json', pipeline=[load, *_base_.pipeline[1:]]))\n"
        'model = dict(data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False),\n'
        '             backbone=dict(in_channels=4))\n' + UNTESTED
    ),
    'large': BASE + (
        "data = dict(ann_file='large.json', data_prefix=dict(img='large'))\n"
        'train_dataloader = dict(batch_size=1, dataset=data)\n'
    ),
    'channels': BASE + MODULES + (
        "load = dict(type='LoadMultiChannelImageFromFiles', color_type='grayscale')\n"
        "data = dict(type='FilesOfChannels', pipeline=[load, *_base_.pipeline[1:]])\n"
        'train_dataloader = val_dataloader = test_dataloader = dict(dataset=data)\n'
    ),
    'joined': BASE + (
        'crop = dict(type="RandomCrop", crop_size=(48, 48))\n'
        'other = {**_base_.data, "pipeline": [*_base_.pipeline[:3], crop, _base_.pipeline[3]]}\n'
        'repeated = dict(type="RepeatDataset", times=2, dataset=other)\n'
        'train_dataloader = dict(dataset=dict(\n'
        '    _delete_=True, type="ConcatDataset", datasets=[_base_.data, repeated]))\n'
    ),
    'no_sampler': BASE + 'train_dataloader = dict(sampler=None, batch_sampler=None)\n',
    'hooks': BASE + MODULES + (
        "custom_hooks = [dict(type='ReadsTheDataloader'),\n"
        "    dict(type='PipelineSwitchHook', switch_epoch=0, switch_pipeline=_base_.pipeline)]\n"
    ),
    'one_image': BASE + (
        'train_dataloader = dict(batch_size=1)\n'
        'model = dict(backbone=dict(norm_eval=True, frozen_stages=1))\n'
    ),
    'new_style': """\
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead
from torch.optim import AdamW
from lska_mm import LSKAVAN
model = dict(
    type=ImageClassifier, data_preprocessor=dict(num_classes=2),
    backbone=dict(type=LSKAVAN, kernel_size=7), neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=2, in_channels=256, topk=(1,)))
pipeline = [dict(type=LoadImageFromFile), dict(type=PackInputs)]
data = dict(type=CustomDataset, data_root='classes', pipeline=pipeline)
train_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type=DefaultSampler, shuffle=True), dataset=data)
test_dataloader = dict(
    batch_size=4, num_workers=1, sampler=dict(type=DefaultSampler, shuffle=False), dataset=data)
test_evaluator = dict(type=Accuracy, topk=(1,))
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3))
default_scope = None
""",
    'video': """\
_base_ = ['mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py']
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
arch = dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4)
model = dict(detector=dict(
    init_cfg=None,
    backbone=dict(
        _delete_=True, type='LSKAVAN', kernel_size=7, out_indices=(0, 1, 2, 3), arch=arch),
    neck=dict(in_channels=arch['embed_dims']),
    roi_head=dict(bbox_head=dict(num_classes=2))))
shared = [
    dict(type='LoadImageFromFile'), dict(type='LoadTrackAnnotations'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True)]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='TrackImgSampler'),
    dataset=dict(
        type='Clips', data_root='.', ann_file='clips.json', data_prefix=dict(img_path='img'),
        pipeline=[
            dict(type='UniformRefFrameSample', num_ref_imgs=1, frame_range=2),
            dict(type='TransformBroadcaster', share_random_params=True, transforms=shared),
            dict(type='PackTrackInputs')]))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4))
train_cfg = dict(max_epochs=1)
val_cfg = test_cfg = None
""",
    'folds': CLASSIFIER + (
        'train_dataloader = dict(batch_size=4, num_workers=1, sampler=sampler, dataset=dict(\n'
        "    type='KFoldDataset', dataset=data, num_splits=2, fold=0))\n"
    ),
    'simclr': CLASSIFIER.replace('test_cfg = dict()\n', '') + """\
view = [dict(type='RandomResizedCrop', scale=48), dict(type='PackInputs')]
train_dataloader = dict(batch_size=4, num_workers=1, sampler=sampler, dataset={
    **data, 'pipeline': [dict(type='LoadImageFromFile'), dict(
        type='MultiView', num_views=2, transforms=[view[:1]]), dict(type='PackInputs')]})
model = dict(
    type='SimCLR', data_preprocessor=dict(type='SelfSupDataPreprocessor'), backbone=backbone,
    neck=dict(
        type='NonLinearNeck', in_channels=32, hid_channels=32, out_channels=8, num_layers=2),
    head=dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss'), temperature=0.1))
test_dataloader = test_evaluator = None
""",
    'binary': SEGMENTOR,
    'one_class': SEGMENTOR.replace('num_classes=2', 'num_classes=1'),
    'schedulers': BASE + (  # every one of MMEngine's, one after the other or all at once
        'param_scheduler = ['
        + ', '.join(f'dict(type={name!r}, {more})' for name, more in SCHEDULERS.items()) + ']\n'
    ),
}  # fmt: skip
ITERATIONS = ('semi', 'binary', 'one_class')
ONLY_TRAINED = ('tif', 'npy', 'video', 'simclr')


def write_images(folder):
    """Eight images as PNG, TIFF and .npy, in classes and with masks; one beyond Pillow's limit."""
    for name in ('img', 'large', 'binary', 'classes/a', 'classes/b'):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        image = np.full((64, 96, 3), 20 * i, np.uint8)
        for path in (f'img/{i}.png', f'classes/{"ab"[i % 2]}/{i}.png'):
            cv2.imwrite(str(folder / path), image)
        cv2.imwrite(str(folder / f'binary/{i}.png'), np.eye(64, 96, dtype=np.uint8))
        cv2.imwrite(str(folder / f'img/{i}.tif'), np.ones((64, 96, 4), np.float32))
        np.save(folder / f'img/{i}.npy', np.ones((64, 96, 4), np.float32))
    cv2.imwrite(str(folder / 'large/0.png'), np.zeros((13_400, 13_400), np.uint8))


def write_annotations(folder):
    """Files as COCO has them, and one of two clips of two frames."""
    images = [dict(id=i + 1, file_name=f'{i}.png', width=96, height=64) for i in range(8)]
    box = dict(bbox=[8, 8, 28, 24], area=672, iscrowd=0, segmentation=[[8, 8, 36, 8, 36, 32]])
    boxes = [dict(id=i + 1, image_id=i + 1, category_id=1 + i % 2, **box) for i in range(8)]
    data = dict(
        images=images, annotations=boxes, categories=[dict(id=1, name='a'), dict(id=2, name='b')]
    )

    def renamed(suffix):
        return [{**i, 'file_name': i['file_name'].replace('png', suffix)} for i in images]

    frames = [{**x, 'video_id': i // 2, 'frame_id': i % 2} for i, x in enumerate(images[:4])]
    tracked = [{**b, 'instance_id': i // 2, 'video_id': i // 2} for i, b in enumerate(boxes[:4])]
    large = [dict(id=1, file_name='0.png', width=13_400, height=13_400)]
    big = {**boxes[0], 'bbox': [80, 80, 6000, 6000], 'area': 36_000_000}
    variants = dict(
        ann={},
        none=dict(annotations=[]),
        tif=dict(images=renamed('tif')),
        npy=dict(images=renamed('npy')),
        large=dict(images=large, annotations=[big]),
        clips=dict(images=frames, annotations=tracked, videos=[dict(id=0), dict(id=1)]),
    )
    for name, change in variants.items():
        (folder / f'{name}.json').write_text(json.dumps({**data, **change}))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('setups')
    write_images(folder)
    write_annotations(folder)
    for path in Path(__file__).with_name('setups').glob('*.py'):
        shutil.copy(path, folder)
    for name, text in CONFIGS.items():
        if text:
            (folder / f'{name}.py').write_text(text)
    return folder


def last_lines(printed):
    return [line for line in printed.splitlines() if re.search(r'Epoch\(|Iter\(|resumed', line)]


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_tests_and_resumes(name, folder, run):
    config, work_dir = f'{name}.py', f'work_dirs/{name}'
    environ = dict(cwd=folder, PYTHONPATH=str(folder), OMP_NUM_THREADS='1')
    tools = Path(__file__).parents[1] / 'tools'
    train = ('python', tools / 'train.py', config, '--work-dir', work_dir)
    lines = [last_lines(run(*train, **environ))[-1]]
    checkpoint = (folder / work_dir / 'last_checkpoint').read_text()
    if name not in ONLY_TRAINED:
        # As MMEngine's dump of a training that was resumed has it.
        printed = run(
            'python', tools / 'test.py', config, checkpoint, '--work-dir', f'{work_dir}/test',
            '--cfg-options', 'resume=True', **environ,
        )  # fmt: skip
        lines.append(last_lines(printed)[-1])
    longer = 'train_cfg.max_iters=8' if name in ITERATIONS else 'train_cfg.max_epochs=2'
    again = last_lines(run(*train, '--resume', '--cfg-options', longer, **environ))
    assert any('resumed epoch: ' in line for line in again)
    lines.append(again[-1])
    assert (folder / work_dir / 'last_checkpoint').read_text() != checkpoint
    print('\n'.join(f'{name}: {line.partition("INFO - ")[2]}' for line in lines))


def test_a_data_set_that_is_not_there_fails_with_the_toolbox_s_words(folder, run):
    """CIFAR-10, whose `split` is not a folder."""
    kind = "type='CustomDataset', data_root='classes', pipeline=pipeline"
    assert kind in CLASSIFIER
    cifar = "type='CIFAR10', data_root='cifar', split='train', download=False"
    text = CLASSIFIER.replace(kind, cifar)
    (folder / 'cifar.py').write_text(text)
    tools = Path(__file__).parents[1] / 'tools'
    printed = run('python', tools / 'train.py', 'cifar.py', code=1, cwd=folder)
    assert 'Cannot find CIFAR10 dataset in' in printed
