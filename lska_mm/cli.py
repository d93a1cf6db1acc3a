"""What the tools share: arguments, the config of any toolbox, and how they end."""

import argparse
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from .engine.distributed import init_cpu
from .weights.match import load_whole
from .weights.names import get_state_dict


def report_errors(*errors: type[Exception]) -> Callable[[Callable[[], None]], Callable[[], int]]:
    """Decorate a tool's ``main``: these errors end it with a line instead of a traceback.

    It returns an exit code then, for `sys.exit`: 0; or 1 after one of ``errors``,
    which is printed as ``tool.py: message``.
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


# --- Arguments ------------------------------------------------------------------


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, {}):
            return action.help
        return super()._get_help_string(action)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser whose help shows defaults."""
    return argparse.ArgumentParser(description=description, formatter_class=_Defaults)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides settings of a config."""
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={},
                        help='override settings: key=value, key="[a,b]"')  # fmt: skip


def ending(suffix: str) -> Callable[[str], Path]:
    """Make a converter of an argument that names a file to write."""

    def convert(path: str) -> Path:
        if Path(path).suffix != suffix:
            raise argparse.ArgumentTypeError(f'{path} does not end in {suffix}')
        return Path(path)

    return convert


png, pth = ending('.png'), ending('.pth')


def size(text: str) -> tuple[int, int]:
    """Convert an argument HEIGHTxWIDTH."""
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, as 224x224')
    return int(match[1]), int(match[2])


def square(text: str) -> int:
    """Convert an argument HEIGHTxWIDTH whose two numbers are the same."""
    height, width = size(text)
    if height != width:
        raise argparse.ArgumentTypeError(f'{text!r} is not a square, as 224x224')
    return height


def base_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that training and testing have in common."""
    parser = make_parser(description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; by default the '
                        "config's, or work_dirs/CONFIG_NAME")  # fmt: skip
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help='set by launchers')  # fmt: skip
    for name in ('pin-memory', 'persistent-workers'):
        parser.add_argument(f'--no-{name}', action='store_true', help='as mmpretrain has it')
    return parser


def converter_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that converters of checkpoints have in common."""
    parser = make_parser(description)
    parser.add_argument('src', help='checkpoint in any published layout')
    parser.add_argument('dst', type=pth, help='file to write, .pth; a hash is added to its name')
    return parser


# --- Config and Runner ------------------------------------------------------------


def read_config(path: str) -> Config:
    """Read a config.

    Raises:
        OSError: If there is none, with a hint where only ``.py`` lacks; if it is a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f'{path} is a folder, not a config file.')
    if not Path(path).is_file():
        hint = f' There is {path}.py.' if Path(f'{path}.py').is_file() else ''
        raise FileNotFoundError(f'No config at {path}.{hint}')
    return Config.fromfile(path)


def toolbox(cfg: Config) -> str:
    """Return the package that a config is for: its default scope, or that of its model."""
    if cfg.get('default_scope'):
        return cfg.default_scope
    kind = cfg.model.type  # 'mmdet.RetinaNet', or the class itself
    return (kind if isinstance(kind, str) else kind.__module__).partition('.')[0]


def load_config(args: argparse.Namespace, **loader: Any) -> Config:
    """Read the config and apply the arguments of `base_parser` to it.

    Args:
        args: What `base_parser` parsed.
        loader: What mmpretrain's own tool sets in its dataloaders by default; the
            other toolboxes' set nothing.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
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


def load_model(
    config: str, checkpoint: str, options: dict | None = None
) -> tuple[Config, nn.Module]:
    """Return the config, ``options`` changed, and the trained model, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model.
    """
    cfg = read_config(config)
    cfg.merge_from_dict(options or {})
    init_default_scope(toolbox(cfg))
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    if 'data_preprocessor' in cfg:  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    model.eval()
    print(f'loaded {load_file(model, checkpoint)}')
    return cfg, model


def load_file(model: nn.Module, checkpoint: str) -> str:
    """Load a checkpoint into a model, none of which may stay random.

    Returns:
        What was loaded, in words: the file's name, and whether its weights are
        averaged; MMEngine's EMAHook puts the averaged ones where others have the last.
    """
    content = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    load_whole(model, get_state_dict(content), checkpoint)
    averaged = ', averaged weights (EMA)' if 'ema_state_dict' in content else ''
    return f'{Path(checkpoint).name}{averaged}'


def load_backbone(cfg: Config, checkpoint: str | None = None) -> tuple[nn.Module, str]:
    """Load the backbone of a config from a checkpoint of any model that has the same one.

    Returns:
        The backbone, in evaluation mode, random without a checkpoint; and what its
        weights are, in words.

    Raises:
        CheckpointError: If the checkpoint is not of the config's backbone.
        ValueError: If the config has no backbone.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'{cfg.filename} has no model.backbone.')
    init_default_scope(toolbox(cfg))
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    if checkpoint is None:
        init_quietly(backbone)
        weights = 'random weights'
    else:
        weights = f'backbone of {load_file(nn.ModuleDict(dict(backbone=backbone)), checkpoint)}'
    backbone.eval()  # those of mmpretrain return nothing
    return backbone, weights


def init_quietly(module: Any) -> None:
    """Give a module its random weights, without a line in the log for every parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    module.init_weights()
    logger.setLevel(level)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image (H, W, 3), BGR.

    Raises:
        OSError: If there is none: no file, a folder, or something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'No image at {path}.')
    try:
        image = mmcv.imread(str(path))
    except cv2.error:  # of an empty file
        image = None
    if image is None:
        raise OSError(f'{path} is not an image.')
    return image


def normalize(images: np.ndarray | Tensor, cfg: Config) -> Tensor:
    """Convert images (B, 3, H, W) in BGR, 0 to 255, to what the config's backbone wants."""
    norm = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    images = torch.as_tensor(images).float()
    if norm.get('bgr_to_rgb') or norm.get('to_rgb'):
        images = images.flip(1)
    mean, std = norm.get('mean') or [0.0], norm.get('std') or [1.0]
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


# --- Output -----------------------------------------------------------------------


def markdown(rows: Iterable[Iterable[Any]]) -> str:
    """Format rows, the first of them the head, as a Markdown table."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *body])
