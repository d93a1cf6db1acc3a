"""Fold norms and layer scales of a trained LSKA-VAN into its convolutions.

    python tools/model_converters/reparameterize_model.py CONFIG CHECKPOINT SAVE_PATH

What it saves is for inference, and gives the same outputs but for rounding. It
loads with the same config and model.backbone.deploy=True.
"""

import argparse
import sys
from pathlib import Path

import torch

from lska_mm.cli import load_model, report_errors
from lska_mm.weights.convert import written_beside
from lska_mm.weights.names import CheckpointError


def reparameterize(config: str, checkpoint: str, save_path: Path) -> None:
    """Convert the backbone of any of the toolboxes' models.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model.
        TypeError: If there is no LSKAVAN, or it has other norms than BatchNorm.
    """
    _, model = load_model(config, checkpoint)
    backbone = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'switch_to_deploy'):
        raise TypeError(
            f'{type(model).__name__} has no LSKAVAN in model.backbone to deploy, but '
            f'{type(backbone).__name__}.'
        )
    backbone.switch_to_deploy()
    with written_beside(save_path) as part:
        torch.save(dict(state_dict=model.state_dict()), part)


@report_errors(CheckpointError, OSError, TypeError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Make a checkpoint for inference')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('save_path', type=Path, help='file to write')
    args = parser.parse_args()
    reparameterize(args.config, args.checkpoint, args.save_path)
    print(f'written to {args.save_path}; it loads with model.backbone.deploy=True')


if __name__ == '__main__':
    sys.exit(main())
