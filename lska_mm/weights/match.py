"""What tensors are, and whether they are a model's.

MMEngine loads with ``strict=False``, which leaves a wrong layout or kernel size
behind as random weights and a warning: `adapt_state_dict` makes that an error.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..models.archs import ARCHS
from .names import CheckpointError, convert_key, convert_state_dict, from_file

# What every VAN has, and no subclass adds.
_PUBLISHED = re.compile(
    r'(norm\d+|patch_embed\d+\.(proj|norm)|block\d+\.\d+\.(norm[12]|layer_scale_[12]|shortcut|'
    r'attn\.(proj_[12]|spatial_gating_unit\.\w+)|mlp\.(fc[12]|dwconv)))(\.[^.]+)?'
)

# --- What a set of tensors is --------------------------------------------------


def describe(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the network off the names and shapes of its tensors.

    Args:
        state_dict: In any of the layouts.

    Returns:
        ``arch`` (embed_dims, depths and ffn_ratios), ``attention``,
        ``kernel_size`` (a list only where the stages differ), ``in_channels`` and
        unusual ``patch_sizes`` of `LSKAVAN`; None if these are not the tensors of one.
    """
    shapes = {
        convert_key(key).removeprefix('backbone.'): tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, Tensor) and value.dim() == 4 and value.numel()
    }
    gate = _read_gate(shapes, 1)
    if gate is None or 'patch_embed1.proj.weight' not in shapes:
        return None
    depths, patches, ffn_ratios = list[int](), list[tuple](), list[int]()
    while (patch := shapes.get(f'patch_embed{len(depths) + 1}.proj.weight')) is not None:
        block = f'block{len(depths) + 1}.'
        depths.append(len({key.split('.')[1] for key in shapes if key.startswith(block)}))
        ffn_ratios.append(shapes.get(f'{block}0.mlp.fc1.weight', (0,))[0] // patch[0])
        patches.append(patch)
    embed_dims, patch_sizes = [patch[0] for patch in patches], [patch[-1] for patch in patches]
    # A stage whose gate is damaged is described like the first.
    kernel_sizes = [(_read_gate(shapes, i + 1) or gate)[1] for i in range(len(depths))]
    usual = patch_sizes == [7, 3, 3, 3][: len(depths)]
    return dict(
        arch=dict(embed_dims=embed_dims, depths=depths, ffn_ratios=ffn_ratios),
        attention=gate[0],
        kernel_size=kernel_sizes[0] if len(set(kernel_sizes)) == 1 else kernel_sizes,
        in_channels=patches[0][1],
        **({} if usual else dict(patch_sizes=patch_sizes)),
    )


def _read_gate(shapes: Mapping[str, tuple], stage: int) -> tuple[str, int] | None:
    """``attention`` and ``kernel_size`` of a stage, counted from 1."""
    gate = f'block{stage}.0.attn.spatial_gating_unit.'
    convs = {
        name: shapes[f'{gate}{name}.weight'][-1]
        for name in ('conv0', 'conv0h', 'conv_spatial', 'conv_spatial_h')
        if f'{gate}{name}.weight' in shapes
    }
    if len(convs) not in (1, 2):
        return None
    attention = 'LSKA' if 'conv0h' in convs else 'LKA'
    local, *far = convs.values()
    if not far:
        return f'{attention}-trivial', local
    # The first pair is 2 * dilation - 1 long, see `lska_mm.models.lska`.
    return attention, local + (local + 1) // 2 * (far[0] - 1)


def arch_name(arch: Mapping[str, Any]) -> str | None:
    """Return the name of an arch in the zoo, also of its first stages alone."""
    stages = len(arch['depths'])
    for name, known in ARCHS.items():
        if all(list(arch[key]) == values[:stages] for key, values in known.items()):
            return name
    return None


def _signature(state_dict: Mapping[str, Any]) -> str | None:
    """The call that builds the network of these tensors."""
    description = describe(state_dict)
    if description is None:
        return None
    arch = arch_name(description['arch']) or description['arch']
    rest = ', '.join(f'{k}={v!r}' for k, v in description.items() if k != 'arch')
    return f'LSKAVAN(arch={arch!r}, {rest})'


def summarize(state_dict: Mapping[str, Any]) -> str:
    """Say in words what tensors are: of which backbone and other parts."""
    parts = {convert_key(key).split('.')[0] for key in state_dict}
    named = [_signature(state_dict) or part if part == 'backbone' else part for part in parts]
    return ', '.join(sorted(named)) or 'no tensors'


# --- Into a model --------------------------------------------------------------


def unwrap(model: Any) -> Any:
    """Return the model itself, without DDP or test-time augmentation around it."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def load_whole(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load tensors into a model, none of which may stay random.

    Args:
        model: Bare or wrapped.
        state_dict: Tensors under the model's names; others are ignored.
        source: The file that they are from.

    Raises:
        CheckpointError: If tensors are missing or have other shapes; says what
            the file holds.
    """
    model = unwrap(model)
    tensors = {re.sub(r'^(module\.)+', '', str(key)): v for key, v in state_dict.items()}
    tensors = from_file(tensors, '')
    try:
        missing = model.load_state_dict(tensors, strict=False).missing_keys
        problem = f'{len(missing)} tensors are missing (first: {missing[0]})' if missing else ''
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip().rstrip('.')
    if problem:
        raise CheckpointError(
            f'{source} cannot be loaded into the {type(model).__name__} of the config: '
            f'{problem}. The file holds {summarize(tensors)}.'
        )


def adapt_state_dict(
    backbone: Any, state_dict: dict[str, Any], prefix: str, refuse: bool, file: str = ''
) -> None:
    """Give the tensors of a backbone in ``state_dict`` its own names, in place.

    What follows ``prefix`` may be in any layout. What is not the backbone's (a head, a neck,
    stages that it did not build) is dropped. Modules that a subclass adds, in blocks too,
    may be among the tensors or not.

    Args:
        backbone: An `LSKAVAN`.
        state_dict: Tensors, of other modules too.
        prefix: What stands in front of the backbone's names.
        refuse: Whether to refuse what is not exactly the backbone's.
        file: What the tensors are from, for errors to begin with.

    Raises:
        CheckpointError: If it is refused: a part of the backbone would be left random,
            or a part of the tensors unused.
    """
    own = backbone.state_dict()
    expected = {key: value for key, value in own.items() if _is_van(key)}
    more = {key.partition('.')[0] for key in own.keys() - expected.keys()}
    offered = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    converted = convert_state_dict({key[len(prefix) :]: v for key, v in offered.items()})
    found = {key.removeprefix('backbone.'): v for key, v in converted.items() if _is_van(key)}
    built = {
        key: value
        for key, value in found.items()
        if int(re.findall(r'\d+', key)[0]) <= backbone.num_stages
    }
    problem = _compare(built, expected) if refuse else None
    if problem:
        where = ', '.join(filter(None, (file, prefix.rstrip('.'))))
        raise CheckpointError(
            f'{where}{": " if where else ""}{_explain(found, expected, list(offered), problem)} '
            'Nothing was loaded.'
        )
    for key, value in offered.items():
        name = re.sub(r'^(module\.)*(backbone\.)?', '', key[len(prefix) :])
        if not _is_van(name) and name.partition('.')[0] in more:
            state_dict[prefix + name] = value
    state_dict.update((prefix + key, value) for key, value in built.items())


def _explain(found: Mapping, expected: Mapping, offered: list[str], problem: str) -> str:
    """Say what tensors are, what the backbone is, and what to change."""
    weights, backbone = describe(found), describe(expected) or {}
    if weights is None:
        names = ', '.join(offered[:3]) or 'none'
        offer = f'No LSKA-VAN among the {len(offered)} tensors offered (first: {names})'
        return f'{offer}, this backbone is {_signature(expected)}: {problem}.'
    deployed = 'block1.0.shortcut' in found
    if deployed != ('block1.0.shortcut' in expected):
        return (
            'The weights are deployed, with norms folded into convolutions, and this backbone is '
            'not: set model.backbone.deploy=True.'
            if deployed
            else 'This backbone is deployed and the weights are not: load them before '
            'switch_to_deploy(), or make deployed ones of them by reparameterize_model.py.'
        )
    differ = [key for key in weights.keys() | backbone.keys()
              if weights.get(key) != backbone.get(key)]  # fmt: skip
    if not differ:
        return f'The weights are of {_signature(found)}, as this backbone is, but {problem}.'
    advice = 'Change the backbone in the config, or the checkpoint'
    if set(differ) <= {'kernel_size', 'attention', 'in_channels'}:
        advice += ' (resize_weights.py and van2lska.py in tools/model_converters do)'
    return (
        f'The weights are of {_signature(found)}, this backbone is {_signature(expected)}: '
        f'{problem}. {advice}.'
    )


def _is_van(key: str) -> bool:
    return re.match(r'(backbone\.)?(patch_embed|blocks?|norm)\d+\.', key) is not None


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Say what keeps the tensors found from being those expected."""
    shared = [key for key in expected if key in found]
    others = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if others:
        return f'{len(others)} of them are not tensors (first: {others[0]})'
    missing = [key for key in expected if key not in found and _PUBLISHED.fullmatch(key)
               and not key.endswith('num_batches_tracked')]  # fmt: skip
    if missing:
        return f'{len(missing)} tensors are missing (first: {missing[0]})'
    extra = [key for key in found if key not in expected]
    if extra:
        return f'{len(extra)} tensors have no place (first: {extra[0]})'
    differ = [key for key in shared if found[key].shape != expected[key].shape]
    if differ:
        return (
            f'{len(differ)} tensors differ in shape (first: {differ[0]}, found '
            f'{tuple(found[differ[0]].shape)}, expected {tuple(expected[differ[0]].shape)})'
        )
    wrong = [key for key in shared if not found[key].to(expected[key].dtype).isfinite().all()]
    if wrong:
        return (
            f'{len(wrong)} of {len(found)} tensors hold NaN or infinity (first: {wrong[0]}), as '
            'after a training that diverged; take an earlier checkpoint'
        )
    return None
