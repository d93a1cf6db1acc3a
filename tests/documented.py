"""The commands in README and docs, and what test_docs.py adds to them and expects of them."""

from lska_mm import __version__

SHORT = [
    '--cfg-options',
    *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
    'train_cfg.val_interval=12',
    'train_dataloader.dataset.pipeline.2.scale=(96,64)',
    'val_dataloader.dataset.pipeline.1.scale=(96,64)',
    'default_hooks.checkpoint.interval=12',
    'default_hooks.logger.interval=1',
]
ONE_EPOCH = [*SHORT, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
FEWER_REGIONS = ['model.train_cfg.rcnn.sampler.num=16']
TEST_SHORT = [*SHORT[:7], 'test_dataloader.dataset.pipeline.1.scale=(96,64)']
SEGMENTOR_SHORT = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1',
                   'default_hooks.checkpoint.interval=1']  # fmt: skip
RETINANET = 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
RETINANET_CHECKPOINT = 'work_dirs/retinanet_lska-van-tiny_fpn_1x_coco/epoch_12.pth'
R50_LSKA = 'configs/detection/retinanet_r50-lska_fpn_1x_coco.py'
CLASSIFIER = 'work_dirs/demo-classification/epoch_15.pth'
SEGMENTATION = 'demo/lska-van-tiny_fpn_nuclei.py'
SEGMENTOR = 'work_dirs/demo-segmentation/iter_200.pth'
IN1K = 'configs/classification/lska-van-tiny_4xb128_in1k.py'
WEIGHTS = 'pretrained/lska-van-tiny_k23_in1k.pth'
CONVERTER = 'python tools/model_converters/convert_checkpoint.py'
RESIZE = f'{CONVERTER} pretrained/lska-van-tiny_k23_in1k.pth'
CONVERT = f'{RESIZE} lska-van-tiny.pth'
CORRUPT = (
    'python tools/dataset_converters/imagenet_c.py data/digits/val --out data/digits-c '
    '--size 64x64 --per-class 1 --corruptions fog contrast'
)
TEST_CORRUPTED = (
    f'python tools/analysis_tools/imagenet_c.py demo/lska-van-tiny_digits.py {CLASSIFIER} '
    'data/digits-c --work-dir work_dirs/digits-c'
)
SEEDS = 'python .dev_scripts/seeds.py work_dirs/pretraining/*/ --metrics coco/segm_mAP'
FOLD = f'python tools/model_converters/reparameterize_model.py {SEGMENTOR} work_dirs/deployed.pth'
EXPORT = {
    f'python tools/deployment/export_onnx.py {SEGMENTATION} {SEGMENTOR} work_dirs/segmentor.onnx '
    '--size 128x128': ([], 'written to work_dirs/segmentor.onnx'),
    f'python tools/deployment/quantize.py {SEGMENTATION} work_dirs/segmentor.onnx '
    'work_dirs/segmentor-int8.onnx': (
        ['--num-images', '1'], 'written to work_dirs/segmentor-int8.onnx',
    ),
    f'python tools/deployment/test.py {SEGMENTATION} work_dirs/segmentor-int8.onnx '
    '--engine openvino': ([], 'mIoU: '),
}  # fmt: skip
VAN = 'van-tiny_8xb128_in1k_20220501-385941af.pth'

# Of each text, a command: what is added to it here, and what it must print.
# `make` only shows what it would do; the tests of demo/run.sh do it.
COMMANDS = {
    'README.md': {
        'pip install -e .': (['--dry-run', '--no-build-isolation'], 'Would install lska'),
        'python -c "from mmcv.ops import nms; import lska_mm; print(lska_mm.__version__)"': (
            [], __version__,
        ),
        'make demo': (['-n'], 'TASK=detection bash demo/run.sh'),
        'make test': (['-n'], 'python -m pytest'),
        'python tools/train.py my_config.py': (
            [*ONE_EPOCH, *FEWER_REGIONS], 'Epoch(val) [1][1/1]',
        ),
        'python tools/test.py my_config.py work_dirs/my_config/epoch_12.pth': (
            TEST_SHORT, 'Epoch(test) [1/1]',
        ),
        'python -m pydoc lska_mm.LSKAVAN': ([], 'drop_path_rate: Probability'),
    },
    'docs/get_started.md': {
        f'python tools/train.py {RETINANET}': (SHORT, 'Epoch(val) [12][1/1]'),
        f'python tools/train.py {RETINANET} --resume': (
            [*SHORT, 'train_cfg.max_epochs=13'], 'Epoch(train) [13][1/1]',
        ),
        'python $MMPRETRAIN/tools/analysis_tools/analyze_logs.py plot_curve '
        'work_dirs/retinanet_lska-van-tiny_fpn_1x_coco/*/vis_data/scalars.json --keys loss '
        '--out loss.png': ([], 'save curve to: loss.png'),
        f'bash tools/dist_train.sh {RETINANET} 2': (ONE_EPOCH, 'GPU number: 2'),
        f'python tools/test.py {RETINANET} {RETINANET_CHECKPOINT} --out predictions.pkl': (
            TEST_SHORT, 'predictions.pkl',
        ),
        'python $LSKA/tools/train.py my_coco.py': (
            [*SHORT, 'train_cfg.max_epochs=1'], 'Epoch(val) [1][1/1]',
        ),
        f'python $MMDET/tools/analysis_tools/get_flops.py {RETINANET} --num-images 1': (
            SHORT, 'Params: 13.3',
        ),
    },
    'docs/tasks.md': {
        'make demo TASK=classification': (['-n'], 'TASK=classification bash demo/run.sh'),
        'python tools/train.py demo/lska-van-tiny_fpn_nuclei.py --cfg-options '
        f'load_from={CLASSIFIER}': (SEGMENTOR_SHORT, f'Load checkpoint from {CLASSIFIER}'),
        CORRUPT: ([], 'contrast: 10 images'),
        TEST_CORRUPTED: (
            ['--cfg-options', 'test_dataloader.num_workers=0',
             'test_dataloader.persistent_workers=False'], '| contrast |',
        ),
        SEEDS: ([], '| digits | 2 | 0.200 ± 0.141 |'),
    },
    'docs/weights.md': {
        CONVERT: ([], 'written to lska-van-tiny-'),
        f'{RESIZE} lska-van-tiny_k53.pth --kernel-size 53': ([], 'resized, the same function'),
        f'{RESIZE} lska-van-tiny_k11.pth --kernel-size 11 --nearest': (
            [], 'kernels resized, not the same function',
        ),
        f'{RESIZE} lska-van-tiny_4bands.pth --in-channels 4': ([], 'in_channels=4)'),
        f'{CONVERTER} pretrained/{VAN} van-tiny.pth --separate': ([], 'the energy kept at least'),
    },
    'docs/new_heads.md': {
        'python tools/train.py my_atss.py': (ONE_EPOCH, 'Epoch(val) [1][1/1]'),
    },
    'docs/plugin.md': {
        f'python tools/train.py {R50_LSKA}': (
            [*ONE_EPOCH, 'model.backbone.init_cfg=None'], 'Epoch(val) [1][1/1]',
        ),
    },
    'docs/robustness.md': {
        'python tools/train.py demo/lska-van-tiny_fpn_nuclei.py --resume': (
            ['--cfg-options', *SEGMENTOR_SHORT], 'resumed epoch: 0, iter: 1',
        ),
    },
    'docs/model_zoo.md': {},
    'docs/faq.md': {
        'python -c "import lska_mm; from mmengine.registry import MODELS; '
        "print('LSKAVAN' in MODELS)\"": ([], 'True'),
        CONVERT: ([], "LSKAVAN(arch='tiny', attention='LSKA', kernel_size=23"),
        f'python $MMDET/tools/analysis_tools/browse_dataset.py {RETINANET} --output-dir browsed '
        '--not-show': (SHORT, '1/1'),
        f'python $MMPRETRAIN/tools/analysis_tools/get_flops.py {IN1K} --shape 224 224': (
            [], 'Params: 4.029M',
        ),
    },
    'docs/pictures.md': {
        f'python tools/visualization/erf.py --model {IN1K} {WEIGHTS} --model {IN1K} '
        '--images data/imagenet/val --out erf.png': (
            ['--images', 'demo/nuclei', '--num-images', '1', '--size', '64x64'],
            '| lska-van-tiny_4xb128_in1k | 23 | random weights |',
        ),
        f'python tools/visualization/attention.py {IN1K} {WEIGHTS} image.png '
        '--out attention.png': (['--help'], 'usage: attention.py'),
        f'python $MMPRETRAIN/tools/visualization/vis_cam.py image.png {IN1K} {WEIGHTS} '
        '--target-layers backbone.block4.1 --save-path cam.png': ([], f'from path: {WEIGHTS}'),
        f'python tools/test.py my_shape_bias.py {WEIGHTS}': (
            ['--cfg-options', 'test_dataloader.num_workers=0',
             'test_dataloader.persistent_workers=False'],
            'accuracy/top1',
        ),
        'python .dev_scripts/shape_bias.py work_dirs/shape_bias/*.csv '
        '--out shape_bias.png': ([], '| lska-van-tiny | 16 |'),
        'python tools/analysis_tools/compare_kernels.py --kernel-sizes 7 11 23 35 53 65 '
        '--out work_dirs/compare_kernels': (['--help'], 'usage: compare_kernels.py'),
    },
    'docs/deployment.md': {
        FOLD: ([], 'it loads with model.backbone.deploy=True'),
        **EXPORT,
        'python tools/deployment/export_onnx.py demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py '
        'work_dirs/demo-detection/epoch_10.pth detector.onnx --image demo/nuclei/image.png': (
            ['--help'], 'usage: export_onnx.py',
        ),
    },
    'docs/performance.md': {
        'python .dev_scripts/benchmark.py --archs tiny --kernel-sizes 7 23 53 '
        '--out work_dirs/benchmark': (['--help'], 'usage: benchmark.py'),
        'make gpu': (['-n'], 'python -m pytest -m gpu -s tests/gpu'),
        'python .dev_scripts/benchmark.py --device cuda --out work_dirs/benchmark-gpu': (
            ['--help'], 'usage: benchmark.py',
        ),
        'python tests/gpu/everything.py --out work_dirs/gpu': (
            ['--steps', 'machine'], '"step": "machine"',
        ),
        'python .dev_scripts/profile_ops.py --arch base --size 800x1216': (
            ['--arch', 'tiny', '--size', '64x64'], 'depth-wise 3x3 convolution',
        ),
    },
    'docs/tools.md': {
        f'python tools/train.py {SEGMENTATION}': (
            ['--cfg-options', *SEGMENTOR_SHORT], 'Iter(val) [1/1]',
        ),
        f'python tools/test.py {SEGMENTATION} {SEGMENTOR} --show-dir work_dirs/shown': (
            [], 'images with the predictions are in work_dirs/shown',
        ),
        f'bash tools/dist_train.sh {SEGMENTATION} 2': (
            ['--cfg-options', *SEGMENTOR_SHORT], 'GPU number: 2',
        ),
        f'bash tools/dist_test.sh {SEGMENTATION} {SEGMENTOR} 2': ([], 'GPU number: 2'),
        f'{CONVERTER} {CLASSIFIER} work_dirs/classifier.pth': (
            [], 'written to work_dirs/classifier-',
        ),
        FOLD: ([], 'it loads with model.backbone.deploy=True'),
        f'{CONVERTER} {SEGMENTOR} work_dirs/k53.pth --kernel-size 53': (
            [], 'written to work_dirs/k53-',
        ),
        f'{CONVERTER} pretrained/{VAN} work_dirs/van-tiny.pth --separate': (
            [], 'written to work_dirs/van-tiny-',
        ),
        'python tools/dataset_converters/nuclei.py': ([], 'written to data/nuclei'),
        'python tools/dataset_converters/digits.py': ([], 'written to data/digits'),
        CORRUPT: ([], 'contrast: 10 images'),
        TEST_CORRUPTED: (
            ['--cfg-options', 'test_dataloader.num_workers=0',
             'test_dataloader.persistent_workers=False'], '| contrast |',
        ),
        'python tools/analysis_tools/compare_kernels.py --kernel-sizes 7 53 '
        '--out work_dirs/compare_kernels': (
            ['--attentions', 'LSKA', '--size', '64x64'], '| LSKA | 53 |',
        ),
        f'python tools/visualization/attention.py {SEGMENTATION} {SEGMENTOR} '
        'demo/nuclei/image.png --out work_dirs/attention.png': (
            [], 'written to work_dirs/attention.png',
        ),
        f'python tools/visualization/erf.py --model {SEGMENTATION} {SEGMENTOR} '
        '--images data/nuclei/ade/images --out work_dirs/erf.png': (
            ['--size', '64x64'], '| lska-van-tiny_fpn_nuclei | 23 | backbone of iter_200.pth |',
        ),
        **EXPORT,
    },
}  # fmt: skip
