"""Fold norms and layer scales of a trained LSKA-VAN into its convolutions.

    python tools/model_converters/reparameterize_model.py CONFIG CHECKPOINT DST.pth

DST gets a hash in its name. It is for inference, gives the same outputs but for
rounding, and loads with the same config and model.backbone.deploy=True.
"""

import sys
from pathlib import Path

from lska_mm.cli import add_cfg_options, load_model, make_parser, pth, report_errors
from lska_mm.weights.convert import save_with_hash
from lska_mm.weights.names import CheckpointError


def reparameterize(config: str, checkpoint: str, dst: Path, options: dict) -> Path:
    """Deploy the backbone of any of the toolboxes' models; return the file written.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model, or deployed already.
        TypeError: If there is no LSKAVAN, or it has other norms than BatchNorm.
    """
    _, model = load_model(config, checkpoint, options)
    backbone = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'switch_to_deploy'):
        raise TypeError(
            f'{type(model).__name__} has no LSKAVAN in model.backbone to deploy, but '
            f'{type(backbone).__name__}.'
        )
    if getattr(backbone, 'deployed', False):
        raise CheckpointError(f'{checkpoint} is deployed already.')
    backbone.switch_to_deploy()
    return save_with_hash(dict(state_dict=model.state_dict()), dst, checkpoint)


@report_errors(CheckpointError, OSError, TypeError)
def main() -> None:
    parser = make_parser('Make a checkpoint for inference')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('dst', type=pth, help='file to write, .pth; a hash is added to its name')
    add_cfg_options(parser)
    args = parser.parse_args()
    written = reparameterize(args.config, args.checkpoint, args.dst, args.cfg_options)
    print(f'it loads with model.backbone.deploy=True\nwritten to {written}')


if __name__ == '__main__':
    sys.exit(main())
