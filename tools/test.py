"""Test a checkpoint of a detector, segmentor or classifier.

    python tools/test.py CONFIG CHECKPOINT [--out FILE.pkl] [--show-dir DIR] [--tta]
    bash tools/dist_test.sh CONFIG CHECKPOINT GPUS ...

The config's `default_scope` says which toolbox it is for.
"""

from mmengine.config import ConfigDict

from lska_mm.distributed import name_lost_ranks
from lska_mm.launch import base_parser, build_runner, check_data, load_config

# Each toolbox has its own way to dump predictions and to draw them.
DUMP_METRIC = dict(mmdet='DumpDetResults', mmseg='DumpResults', mmpretrain='DumpResults')
DRAW_HOOK = dict(
    mmdet=lambda folder: dict(draw=True, test_out_dir=folder),
    mmseg=lambda folder: dict(draw=True),
    mmpretrain=lambda folder: dict(enable=True, out_dir=folder),
)


def parse_args():
    parser = base_parser('Test (and evaluate) a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='dump the predictions to this file')
    parser.add_argument('--show-dir', help='folder for the painted images')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation, by the config's tta_model and tta_pipeline",
    )
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
    return args


@name_lost_ranks()
def main():
    args = parse_args()
    cfg = load_config(args)
    scope = cfg.default_scope
    cfg.load_from = args.checkpoint
    if args.tta:
        missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
        if missing:
            raise KeyError(f'--tta needs {" and ".join(missing)} in {args.config}.')
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    if args.out:
        evaluator = cfg.test_evaluator
        evaluator = list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
        cfg.test_evaluator = [*evaluator, dict(type=DUMP_METRIC[scope], out_file_path=args.out)]
    if args.show_dir:
        cfg.default_hooks.visualization.update(DRAW_HOOK[scope](args.show_dir))
        cfg.visualizer.save_dir = args.show_dir
    check_data(cfg, 'test')
    runner = build_runner(cfg)
    runner.register_hook(dict(type='CheckWeightsHook'))
    runner.test()


if __name__ == '__main__':
    main()
