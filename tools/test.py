"""Test a checkpoint of a detector, segmentor or classifier.

    python tools/test.py CONFIG CHECKPOINT [--out OUT] [--show-dir DIR] [--tta]
    bash tools/dist_test.sh CONFIG CHECKPOINT GPUS ...

Does what the own tool of the config's toolbox does, but refuses a checkpoint that
leaves a part of the model random.
"""

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from lska_mm.cli import base_parser, build_runner, load_config, toolbox
from lska_mm.engine.hooks import CheckWeightsHook

# Each toolbox has its own way to draw predictions, to dump them, and to flip images.
DRAW = dict(
    mmdet=lambda folder: dict(draw=True, test_out_dir=folder),
    mmseg=lambda folder: dict(draw=True),
    mmpretrain=lambda folder: dict(enable=True, out_dir=folder),
)
DUMP = dict(mmdet='mmdet.DumpDetResults', mmpretrain='DumpResults')
BOXES = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
TTA_MODEL = dict(
    mmdet=dict(type='DetTTAModel', tta_cfg=BOXES),
    mmseg=dict(type='SegTTAModel'),
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
)
META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
             'flip_direction')  # fmt: skip


def parse_args():
    parser = base_parser('Test (and evaluate) a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='dump the predictions: into this file, .pkl; of a segmentor, this folder'
    )
    parser.add_argument('--show-dir', help='folder for the painted images')
    parser.add_argument('--show', action='store_true', help='show the painted images')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation, by the config's tta_model and tta_pipeline, or flipping",
    )
    return parser.parse_args()


def enable_tta(cfg):
    """Wrap the model, and give the test its pipeline."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset.dataset
    *steps, pack = dataset.pipeline
    if toolbox(cfg) == 'mmdet':
        pack = dict(type='PackDetInputs', meta_keys=META_KEYS)
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    flipped = [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.get('tta_model', TTA_MODEL[toolbox(cfg)]), module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.get('tta_pipeline', flipped)


def main():
    args = parse_args()
    cfg = load_config(args)
    scope = toolbox(cfg)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.tta:
        enable_tta(cfg)
    if args.out and scope == 'mmseg':
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    if args.show or args.show_dir:
        drawing = dict(**DRAW[scope](args.show_dir), show=args.show, wait_time=args.wait_time)
        cfg.default_hooks.visualization.update(drawing)
        cfg.visualizer.save_dir = args.show_dir
    runner = build_runner(cfg)
    runner.register_hook(CheckWeightsHook())
    if args.out and scope in DUMP:
        dump = METRICS.build(dict(type=DUMP[scope], out_file_path=args.out))
        runner.test_evaluator.metrics.append(dump)
    runner.test()


if __name__ == '__main__':
    main()
