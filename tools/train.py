"""Train a detector, segmentor or classifier.

    python tools/train.py CONFIG [--work-dir DIR] [--resume [CKPT]] [--amp]
    bash tools/dist_train.sh CONFIG GPUS ...

The config's `default_scope` says which toolbox it is for.
"""

from mmengine.device import get_device

from lska_mm.distributed import name_lost_ranks
from lska_mm.launch import base_parser, build_runner, check_data, load_config, resume


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
        help='scale the learning rate to the real batch size',
    )
    return parser.parse_args()


@name_lost_ranks()
def main():
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        if get_device() == 'cpu':
            cfg.optim_wrapper.type = 'AutocastOptimWrapper'
        else:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise KeyError(
                f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}.'
            )
        cfg.auto_scale_lr.enable = True
    check_data(cfg, 'train', 'val')
    position = None
    if args.resume or cfg.get('resume'):
        position = resume(cfg, args.resume or cfg.get('load_from') or 'auto')
    build_runner(cfg, position).train()


if __name__ == '__main__':
    main()
