"""Fold norms and layer scales of a trained LSKA-VAN into its convolutions.

    python tools/model_converters/reparameterize_model.py SRC DST.pth

SRC is a checkpoint of a backbone or a whole model; DST gets a hash in its name. It is for
inference, gives the same outputs except for rounding, and loads with the same config and
model.backbone.deploy=True. The norms must be BatchNorm with running statistics; those at the
end of the stages may be of any kind, and stay. The eps is not among the tensors: it is read
from model.backbone.norm_cfg in the config that MMEngine stores beside them, by default 1e-5;
--norm-eps sets another.
"""

import ast
import re
import sys
from collections.abc import Mapping

from mmengine.registry import MODELS

from lska_mm.cli import converter_parser, report_errors
from lska_mm.weights.convert import State, convert
from lska_mm.weights.match import describe
from lska_mm.weights.names import CheckpointError


def stored_eps(meta: Mapping) -> float | None:
    """Read the norms' eps from the text of a config, without running it."""
    try:
        tree: ast.AST = ast.parse(meta.get('cfg') or '')
    except (SyntaxError, TypeError, ValueError):  # another kind of config
        return None
    for name in ('backbone', 'norm_cfg', 'eps'):
        found = [node.value for node in ast.walk(tree)
                 if isinstance(node, ast.keyword) and node.arg == name]  # fmt: skip
        if not found:
            return None
        tree = found[0]
    return ast.literal_eval(tree)


def fold(state: State, eps: float) -> State:
    """Fold what `LSKAVAN.switch_to_deploy` folds; other tensors stay.

    Raises:
        CheckpointError: If it is folded already, or has norms without running statistics.
    """
    if 'backbone.block1.0.shortcut' in state:
        raise CheckpointError('The checkpoint is deployed already.')
    for norm in ('patch_embed1.norm', 'block1.0.norm1'):
        names = [key.rpartition('.')[2] for key in state if key.startswith(f'backbone.{norm}.')]
        if not {'running_mean', 'running_var'} <= set(names):
            raise CheckpointError(
                f'{norm} cannot be folded: its tensors are {", ".join(names) or "none"}, and only '
                'BatchNorm with running statistics can be folded into a convolution.'
            )
    backbone = MODELS.build(
        dict(
            type='LSKAVAN',
            **(describe(state) or {}),
            out_indices=[-1],
            norm_cfg=dict(type='BN', eps=eps, affine='weight' in names),
            stage_norm_cfg=dict(type='IN'),  # has no tensors
        )
    ).double()
    stages = {key: v for key, v in state.items()
              if re.match(r'backbone\.(patch_embed|block)\d', key)}  # fmt: skip
    backbone.load_state_dict(stages)
    backbone.switch_to_deploy()
    dtype = state['backbone.patch_embed1.proj.weight'].dtype
    folded = {f'backbone.{key}': v.to(dtype) for key, v in backbone.state_dict().items()}
    return {key: v for key, v in state.items() if key not in stages} | folded


@report_errors(CheckpointError, OSError, TypeError, ValueError)
def main() -> None:
    parser = converter_parser('Make a checkpoint for inference')
    parser.add_argument('--norm-eps', type=float, help="eps of the norms; by default from the "
                        "config in the checkpoint, else PyTorch's")  # fmt: skip
    args = parser.parse_args()

    def transform(state: State, meta: Mapping) -> State:
        eps = next(e for e in (args.norm_eps, stored_eps(meta), 1e-5) if e is not None)
        folded = fold(state, eps)
        print(f'folded norms of eps {eps:g}; it loads with model.backbone.deploy=True')
        return folded

    convert(args.src, args.dst, transform)


if __name__ == '__main__':
    sys.exit(main())
