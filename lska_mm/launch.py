"""What the tools share: from arguments to a Runner, or to a trained model."""

import argparse
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.dist import get_backend, is_distributed
from mmengine.logging import print_log
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint

from . import distributed
from .checkpoint import check_state_dict
from .loader import get_state_dict
from .resume import find_checkpoint, read_meta
from .signals import worker_context

SPLITS = ('train', 'val', 'test')
# Hooks of every Runner, in this order where they have the same priority.
GUARDS = (
    'ExactResumeHook',
    'CheckLabelsHook',
    'BadImagesHook',
    'NonFiniteHook',
    'SaveOnSignalHook',
    'DueValidationHook',
)


def report_errors(*errors: type[Exception]) -> Callable[[Callable[[], None]], Callable[[], int]]:
    """Decorate a tool's ``main``: these errors end it with a line instead of a traceback.

    Args:
        errors: Those that say what is wrong with the arguments or the files.

    Returns:
        What makes of ``main`` a function that returns an exit code, for `sys.exit`: 0; or 1
        after one of ``errors``, which is printed as ``tool.py: message``.
    """

    def decorate(main: Callable[[], None]) -> Callable[[], int]:
        @functools.wraps(main)
        def run() -> int:
            try:
                main()
            except errors as error:
                print(f'{Path(inspect.getfile(main)).name}: {error}', file=sys.stderr)
                return 1
            return 0

        return run

    return decorate


def png(path: str) -> Path:
    """The type of an argument that names a picture to write."""
    if Path(path).suffix != '.png':
        raise argparse.ArgumentTypeError(f'{path} does not end in .png')
    return Path(path)


def base_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; '
        'work_dirs/CONFIG_NAME if neither this nor the config names one',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of the config: key=value, key="[a,b]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments of `base_parser` to it."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.merge_from_dict(args.cfg_options)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def check_data(cfg: Config, *splits: str) -> None:
    """Look for the data before anything is built.

    Args:
        cfg: A config of any of the three toolboxes.
        splits: Which dataloaders will be used: ``'train'``, ``'val'``, ``'test'``.

    Raises:
        FileNotFoundError: If a local file or folder is missing, or the folder
            of a class is empty; names it and the keys of the config that it
            comes from.
    """
    for split in splits:
        key = f'{split}_dataloader.dataset'
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        while 'dataset' in dataset:  # RepeatDataset and the like
            key, dataset = f'{key}.dataset', dataset['dataset']
        root = dataset.get('data_root') or ''
        for name, value in {'data_root': '', **_data_parts(dataset)}.items():
            path = os.path.join(root, value or '')
            if path and '://' not in path and not os.path.exists(path):
                keys = (
                    f'{key}.{name}' if name == 'data_root' else f'{key}.data_root and {key}.{name}'
                )
                raise FileNotFoundError(
                    f'No data at {path}. The path comes from {keys}; put the data there, or '
                    f'change the config (or --cfg-options {key}.data_root=...).'
                )
        if cfg.get('default_scope') == 'mmpretrain':
            _check_classes(dataset, key)


def _data_parts(dataset: dict) -> dict[str, str | None]:
    """The files and folders of a dataset below its root, by their keys."""
    parts = {'ann_file': dataset.get('ann_file')}
    prefix = dataset.get('data_prefix') or {}
    if not isinstance(prefix, dict):
        return {**parts, 'data_prefix': prefix}
    if not prefix and 'split' in dataset:  # mmpretrain's ImageNet
        return {**parts, 'split': dataset['split']}
    return {**parts, **{f'data_prefix.{name}': value for name, value in prefix.items()}}


def _check_classes(dataset: dict, key: str) -> None:
    """Look into the folder of each class, where no file lists the images."""
    root, parts = dataset.get('data_root') or '', _data_parts(dataset)
    split = parts.get('split')
    listed = parts.pop('ann_file') or os.path.exists(os.path.join(root, 'meta', f'{split}.txt'))
    folder = os.path.join(root, *(value or '' for value in parts.values()))
    if listed or '://' in folder or not os.path.isdir(folder):
        return
    empty = [c.name for c in os.scandir(folder) if c.is_dir() and not os.listdir(c.path)]
    if empty:
        raise FileNotFoundError(
            f'No image of {len(empty)} classes in {folder}: {", ".join(sorted(empty)[:5])}'
            f'{", ..." if len(empty) > 5 else ""}. The path comes from {key}; put the images '
            'there, or delete the folders and the classes.'
        )


def check_weights(model: Any, path: str) -> None:
    """Compare a checkpoint with the model that it is to be tested in.

    Raises:
        CheckpointError: If it does not hold the whole model, see `check_state_dict`.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    check_state_dict(model, get_state_dict(checkpoint), path, allow_extra=True)


def load_model(config: str, checkpoint: str) -> tuple[Config, Any]:
    """A trained model of any of the three toolboxes, in evaluation mode; and its config.

    Raises:
        CheckpointError: See `check_weights`.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    if 'data_preprocessor' in cfg:  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model).eval()
    check_weights(model, checkpoint)
    load_checkpoint(model, checkpoint, map_location='cpu')
    return cfg, model


def resume(cfg: Config, checkpoint: str) -> dict[str, int]:
    """Let a training go on where a checkpoint leaves it.

    Args:
        cfg: Gets ``load_from``, ``resume`` and the seed of the training so far.
        checkpoint: A file, or ``'auto'`` for the newest whole one in the work dir.

    Returns:
        The ``iter`` and ``epoch`` that are done; nothing without a checkpoint.

    Raises:
        CheckpointError: See `find_checkpoint` and `read_meta`.
    """
    if checkpoint == 'auto':
        found = find_checkpoint(cfg.work_dir)
        if found is None:
            cfg.resume = False
            print_log(
                f'--resume: no checkpoint in {cfg.work_dir}, training starts anew.',
                logger='current',
                level=logging.WARNING,
            )
            return {}
        checkpoint, meta = found
    else:
        meta = read_meta(checkpoint)
    cfg.resume, cfg.load_from = True, checkpoint
    if 'seed' in meta:
        cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': meta['seed']}
    return dict(iter=meta['iter'], epoch=meta['epoch'])


def guard_data(
    loaders: Mapping[str, Any], position: Mapping[str, int] = {}, max_bad_images: int = 0
) -> None:
    """Let datasets name bad files, and each draw from them depend on its place alone.

    Args:
        loaders: Configs of dataloaders, changed in place, under the names of
            their splits. What is built already stays as it is.
        position: Where a training goes on, see `resume`.
        max_bad_images: See `GuardedDataset`; in training only.
    """
    for split, loader in loaders.items():
        if not isinstance(loader, dict):
            continue
        loader['dataset'] = dict(type='GuardedDataset', dataset=loader['dataset'])
        quiet = loader.pop('disable_subprocess_warning', False)
        loader.setdefault(
            'worker_init_fn', dict(type='pass_over_sigterm', disable_subprocess_warning=quiet)
        )
        if loader.get('num_workers'):
            loader.setdefault('multiprocessing_context', worker_context())
        if split == 'train':
            loader['dataset']['max_bad_images'] = max_bad_images
            loader['batch_sampler'] = dict(
                type='SeededBatches',
                batch_sampler=loader.get('batch_sampler'),
                drop_last=loader.pop('drop_last', False),
                **position,
            )


def build_runner(cfg: Config, position: dict[str, int] | None = None) -> Runner:
    """Build the Runner of a training that can be interrupted, or of a test.

    Args:
        cfg: A config of any of the three toolboxes.
        position: Where a training goes on, see `resume`.

    Raises:
        ValueError: If the config's strategy wants several processes, and there is one.
    """
    strategy = (cfg.get('strategy') or {}).get('type', 'SingleDeviceStrategy')
    if cfg.launcher == 'none' and strategy != 'SingleDeviceStrategy':
        raise ValueError(
            f'strategy.type={strategy} is for several processes: bash tools/dist_train.sh CONFIG '
            'GPUS, or another --launcher.'
        )
    if cfg.launcher == 'pytorch' and not is_distributed():
        distributed.init(cfg)
    checkpoints = cfg.get('default_hooks', {}).get('checkpoint')
    if checkpoints and checkpoints.type == 'CheckpointHook':
        checkpoints.type = 'WholeCheckpointHook'
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    # The Runner's own, not yet built: the config is dumped as its author wrote it.
    loaders = {split: getattr(runner, f'_{split}_dataloader') for split in SPLITS}
    guard_data(loaders, position or {}, cfg.get('max_bad_images', 0))
    present = {type(hook).__name__ for hook in runner.hooks}
    for hook in GUARDS:
        if hook not in present:
            runner.register_hook(dict(type=hook))
    if runner.distributed:
        distributed.start_pulse()
        runner.logger.info(
            f'Distributed: world size {runner.world_size}, '
            f'rank {runner.rank}, backend {get_backend()}'
        )
    return runner
