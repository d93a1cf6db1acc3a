"""Train a detector, segmentor or classifier.

    python tools/train.py CONFIG [--work-dir DIR] [--resume [CKPT]] [--amp]
    bash tools/dist_train.sh CONFIG GPUS ...

Does the same as the toolbox's own tool.
"""

import sys

from lska_mm.cli import base_parser, build_runner, load_config, report_errors, toolbox
from lska_mm.weights.loader import find_checkpoint
from lska_mm.weights.names import CheckpointError


def parse_args():
    parser = base_parser('Train a model')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='continue from CKPT, or from the latest checkpoint in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='train in automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the actual batch size',
    )
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    return parser.parse_args()


@report_errors(CheckpointError, OSError)
def main() -> None:
    args = parse_args()
    cfg = load_config(args, persistent_workers=True)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        if toolbox(cfg) == 'mmdet':
            cfg.optim_wrapper.loss_scale = 'dynamic'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise KeyError(
                f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else find_checkpoint(args.resume)
    build_runner(cfg).train()


if __name__ == '__main__':
    sys.exit(main())
