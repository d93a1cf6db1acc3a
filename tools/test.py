"""Test a checkpoint of a detector, segmentor or classifier.

    python tools/test.py CONFIG CHECKPOINT [--out OUT] [--show-dir DIR] [--tta]
    bash tools/dist_test.sh CONFIG CHECKPOINT GPUS ...

Does the same as the toolbox's own tool, but refuses a checkpoint that leaves a part
of the model random.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import mmcv
import mmengine
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import METRICS

from lska_mm.cli import base_parser, build_runner, load_config, report_errors, toolbox
from lska_mm.engine.hooks import CheckWeightsHook
from lska_mm.weights.loader import find_checkpoint
from lska_mm.weights.names import CheckpointError

# Each toolbox dumps predictions, and merges flipped images, in its own way.
DUMP = dict(
    mmdet='mmdet.DumpDetResults', mmrotate='mmdet.DumpDetResults', mmpretrain='DumpResults'
)
BOXES = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
TTA_MODEL = dict(
    mmdet=dict(type='DetTTAModel', tta_cfg=BOXES),
    mmseg=dict(type='SegTTAModel'),
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
)
READABLE = 224  # pixels: the shorter side of small images after enlarging
META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
             'flip_direction')  # fmt: skip


class DrawHook(Hook):
    """Draw the predictions of a segmentor or a classifier for every image into a folder.

    The toolboxes' hooks only draw some images, or overwrite those of the same name. Here files
    are named after the image and its folder; small images of a classifier are enlarged.
    """

    def __init__(self, folder: str, interval: int):
        self.folder, self.interval, self.names = Path(folder), interval, Counter()

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Draw a batch."""
        for i, sample in enumerate(outputs):
            if (batch_idx * len(outputs) + i) % self.interval:
                continue
            path = Path(sample.get('img_path', ''))  # CIFAR has none
            name = '_'.join(filter(None, (path.parent.name, path.stem))) or 'image'
            self.names[name] += 1
            number = f'_{self.names[name]}' if self.names[name] > 1 or not path.name else ''
            out = str(self.folder / f'{name}{number}.png')
            if path.name:
                image = mmcv.imread(sample.img_path, channel_order='rgb')
            else:
                image = data_batch['inputs'][i].permute(1, 2, 0).cpu().numpy().astype('uint8')
            if hasattr(runner.visualizer, 'visualize_cls'):
                factor = max(1, READABLE // min(image.shape[:2]))
                runner.visualizer.visualize_cls(image, sample, rescale_factor=factor, out_file=out)
            else:
                runner.visualizer.add_datasample(name, image, sample, out_file=out)


def parse_args():
    parser = base_parser('Test (and evaluate) a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='dump predictions: to a .pkl file, or a folder for a segmentor'
    )
    parser.add_argument(
        '--out-item', choices=['pred', 'metrics'], help='what --out dumps, by default pred'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--show-dir', help='folder for images with the predictions')
    parser.add_argument('--show', action='store_true', help='show these images')
    parser.add_argument('--interval', type=int, default=1, help='of the images that are shown')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation with the config's tta_model and tta_pipeline, or flipping",
    )
    args = parser.parse_args()
    if args.out_item and not args.out:
        parser.error('--out-item says what --out dumps: give --out, too')
    return args


def enable_tta(cfg):
    """Wrap the model for test-time augmentation, and set the pipeline."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset.dataset
    *steps, pack = dataset.pipeline
    if toolbox(cfg) == 'mmdet':
        pack = dict(type='PackDetInputs', meta_keys=META_KEYS)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]  # as the toolboxes' tools
    if toolbox(cfg) == 'mmseg':  # compares with the labels of the first view
        flips.reverse()
    flipped = [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.get('tta_model', TTA_MODEL[toolbox(cfg)]), module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.get('tta_pipeline', flipped)


@report_errors(CheckpointError, OSError)
def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    scope = toolbox(cfg)
    cfg.load_from = find_checkpoint(args.checkpoint)
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.tta:
        enable_tta(cfg)
    predictions = args.out if args.out_item != 'metrics' else None
    if predictions and scope == 'mmseg':
        if Path(args.out).suffix in ('.pkl', '.pickle', '.json'):
            raise NotADirectoryError(f'--out of a segmentor must be a folder, not {args.out}.')
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    draw = args.show_dir and scope in ('mmseg', 'mmpretrain')
    if args.show or (args.show_dir and not draw):
        drawing = dict(show=args.show, wait_time=args.wait_time)
        drawing['enable' if scope == 'mmpretrain' else 'draw'] = True
        if scope in ('mmseg', 'mmpretrain'):  # the others draw all images
            drawing['interval'] = args.interval
        elif args.show_dir:  # absolute, or below the work dir
            drawing['test_out_dir'] = os.path.abspath(args.show_dir)
        cfg.default_hooks.visualization.update(drawing)
    elif draw:
        cfg.default_hooks.pop('visualization', None)
    runner = build_runner(cfg)
    if draw:
        runner.register_hook(DrawHook(args.show_dir, args.interval))
    runner.register_hook(CheckWeightsHook())
    if predictions and scope in DUMP:
        dump = METRICS.build(dict(type=DUMP[scope], out_file_path=args.out))
        runner.test_evaluator.metrics.append(dump)
    metrics = runner.test()
    if args.out_item == 'metrics':
        mmengine.dump(metrics, args.out)
    if args.show_dir:
        print(f'images with the predictions are in {args.show_dir}')


if __name__ == '__main__':
    sys.exit(main())
