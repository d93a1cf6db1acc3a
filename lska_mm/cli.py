"""Shared parts of the tools: arguments, configs of any toolbox, and error reporting."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.structures import BaseDataElement
from torch import nn

from .engine.distributed import init_cpu
from .weights.loader import find_checkpoint
from .weights.match import load_whole


@contextmanager
def report_errors(*errors: type[Exception]) -> Iterator[None]:
    """Decorate the ``main`` of a tool: these errors end it with one line, not a traceback."""
    try:
        yield
    except errors as error:
        print(f'{Path(sys.argv[0]).name}: {error}', file=sys.stderr)
        sys.exit(1)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser whose help shows all defaults but empty ones."""
    return argparse.ArgumentParser(description=description, formatter_class=_Defaults)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides settings of a config."""
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={},
                        help='override settings: key=value, key="[a,b]"')  # fmt: skip


def ending(suffix: str) -> Callable[[str], Path]:
    """Return the type of an argument that names an output file with this suffix."""

    def convert(path: str) -> Path:
        if Path(path).suffix != suffix:
            raise argparse.ArgumentTypeError(f'{path} does not end in {suffix}')
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f'{folder} is not a folder')
        return Path(path)

    return convert


png, pth = ending('.png'), ending('.pth')


def size(text: str) -> tuple[int, int]:
    """Convert an argument HEIGHTxWIDTH."""
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 224x224')
    return int(match[1]), int(match[2])


def base_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments shared by training and testing."""
    parser = make_parser(description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; by default the '
                        "config's, or work_dirs/CONFIG_NAME")  # fmt: skip
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help='set by launchers')  # fmt: skip
    for name in ('pin-memory', 'persistent-workers'):
        parser.add_argument(f'--no-{name}', action='store_true', help='as in mmpretrain')
    return parser


def converter_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments shared by the checkpoint converters."""
    parser = make_parser(description)
    parser.add_argument('src', help='checkpoint in any supported layout')
    parser.add_argument('dst', type=pth, help='file to write, .pth; a hash is added to its name')
    return parser


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config and override its settings with ``options``."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    return cfg


def toolbox(cfg: Config) -> str:
    """Return the package that a config is for: its default scope, or that of its model."""
    kind = cfg.get('default_scope') or cfg.model.type  # 'mmdet.RetinaNet', or the class itself
    return (kind if isinstance(kind, str) else kind.__module__).partition('.')[0]


def load_config(args: argparse.Namespace, **loader: Any) -> Config:
    """Read the config and apply the arguments of `base_parser` to it.

    ``loader`` holds the dataloader defaults of mmpretrain's own tool of that kind.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if toolbox(cfg) == 'mmpretrain':
        loader = dict(pin_memory=True, collate_fn=dict(type='default_collate'), **loader)
        not_wanted = {key: False for key in ('pin_memory', 'persistent_workers')
                      if getattr(args, f'no_{key}')}  # fmt: skip
        for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(key):
                cfg[key] = ConfigDict({**loader, **cfg[key], **not_wanted})
    cfg.merge_from_dict(args.cfg_options)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that a config asks for."""
    if toolbox(cfg) == 'mmdet':
        from mmdet.utils import setup_cache_size_limit_of_dynamo

        setup_cache_size_limit_of_dynamo()
    init_cpu(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def load_file(model: nn.Module, checkpoint: str) -> str:
    """Load a checkpoint that has every tensor of a model; return its name.

    If these are the averaged weights that MMEngine's EMAHook stores, the name says so.
    """
    content = CheckpointLoader.load_checkpoint(find_checkpoint(checkpoint), map_location='cpu')
    load_whole(model, content, checkpoint)
    averaged = ', averaged weights (EMA)' if 'ema_state_dict' in content else ''
    return f'{Path(checkpoint).name}{averaged}'


def read_image(path: str | Path) -> np.ndarray:
    """Read an image (H, W, 3), BGR; raise an OSError if the file is not one."""
    try:
        image = mmcv.imread(str(path))
    except cv2.error:  # for an empty file
        image = None
    if image is None:
        raise OSError(f'{path} is not an image.')
    return image


def normalize(images: Any, cfg: Config) -> torch.Tensor:
    """Normalize images (B, C, H, W) from a pipeline as the config's model does."""
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    default = 'mmpretrain.ClsDataPreprocessor' if settings else 'ImgDataPreprocessor'
    preprocessor = MODELS.build({'type': default, **(settings or {})})
    samples = [BaseDataElement() for _ in images]
    return preprocessor(dict(inputs=list(torch.as_tensor(images)), data_samples=samples))['inputs']


def markdown(rows: Iterable[Iterable[Any]]) -> str:
    """Format rows, the first one the header, as a Markdown table."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *body])
