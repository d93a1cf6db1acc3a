"""Load the backbone of a config with its weights, and images with its test pipeline."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import cv2
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import nn

from lska_mm.cli import load_file, toolbox


def device(text: str) -> torch.device:
    """Convert an argument that names a device; refuse one that torch cannot use."""
    try:
        torch.ones(1, device=text).item()
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f'{text!r}: {str(error).splitlines()[0]}') from None
    return torch.device(text)


def load_backbone(cfg: Config, checkpoint: str | None = None) -> tuple[nn.Module, str]:
    """Load the backbone of a config from a checkpoint of any model that has the same one.

    Returns:
        The backbone, in evaluation mode, random without a checkpoint; and a description
        of its weights.

    Raises:
        CheckpointError: If the checkpoint does not fit the config's backbone.
        ValueError: If the config has no backbone.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'{cfg.filename} has no model.backbone.')
    init_default_scope(toolbox(cfg))
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    if checkpoint is None:
        logging.disable(logging.INFO)  # would log a line for each parameter
        backbone.init_weights()
        logging.disable(logging.NOTSET)
        weights = 'random weights'
    else:
        weights = f'backbone of {load_file(nn.ModuleDict(dict(backbone=backbone)), checkpoint)}'
    backbone.eval()  # mmpretrain's return nothing
    return backbone, weights


def read(cfg: Config, path: Path, same_size: bool = False) -> dict[str, Any]:
    """Apply the config's test pipeline to an image.

    Args:
        cfg: Config; without such a pipeline, images are loaded with three channels.
        path: Path of the image.
        same_size: Only load and normalize it.

    Raises:
        OSError: If there is no such file, or the pipeline cannot read it.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset['dataset']
    load, *steps = dataset.get('pipeline') or [dict(type='LoadImageFromFile')]
    left_out = r'Annotations|^(?!.*Normalize)' if same_size else 'Annotations'
    steps = [load, *(step for step in steps if not re.search(left_out, str(step['type'])))]
    try:
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        return pipeline(dict(img_path=str(path), img_id=0))
    except (AssertionError, cv2.error) as error:
        raise OSError(f'{path} is not an image that the config can read: {error}') from None
