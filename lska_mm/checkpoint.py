"""The names of tensors: any published layout to ours.

Layouts met in the wild, all of which load without a flag:

1. the ImageNet files of arXiv:2309.01439: ``block1.0.attn.spatial_gating_unit
   .conv0h``, ``head``; sometimes behind ``module.``;
2. the same authors' detection and segmentation copies: ``blocks1``,
   ``DW_conv_h``, ``patch_embed1.projection``;
3. VAN in mmpretrain: ``DW_conv``, ``DW_D_conv`` (``attention='LKA'``);
4. classifiers, detectors and segmentors of this package: ``backbone.``.

`convert_state_dict` brings them all to the fourth. MMEngine loads with
``strict=False``, which would leave a wrong layout or kernel size behind as
random weights and a warning: `adapt_state_dict` makes that an error.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .models import LSKAVAN


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; says what was found and expected."""


# --- Names -------------------------------------------------------------------

# A tensor of the backbone, at the top of a file or behind `backbone.`.
_BACKBONE_KEY = re.compile(r'(?:backbone\.)?((?:patch_embed|blocks?|norm)\d+\..+)')
_RENAMES = (
    (r'^blocks(\d)', r'block\1'),
    (r'^(patch_embed\d+)\.projection\.', r'\1.proj.'),
    (r'\.dwconv(\.dwconv)+(?=\.)', '.dwconv'),
    (r'\.DW_D_conv(_[hv])?(?=\.)', r'.conv_spatial\1'),
    (r'\.DW_conv_?([hv]?)(?=\.)', r'.conv0\1'),
)


def convert_key(key: str) -> str:
    """The name of a tensor in the layout of this package's classifiers.

    Tensors of the backbone get ``backbone.`` in front, those of a published
    linear head ``head.fc.``; names that belong to neither only lose
    ``module.``. Converting twice changes nothing more.
    """
    key = re.sub(r'^(module\.)+', '', key)
    match = _BACKBONE_KEY.fullmatch(key)
    if match:
        key = match[1]
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        return f'backbone.{key}'
    return re.sub(r'^head\.(weight|bias)$', r'head.fc.\1', key)


def convert_state_dict(state_dict: Mapping[str, Any], source: str = '') -> dict[str, Any]:
    """Rename every tensor as `convert_key` says; drops and changes none.

    Args:
        state_dict: In any of the layouts.
        source: The file that it is from, for errors to begin with.

    Raises:
        CheckpointError: If two tensors would get the same name, or one has
            something else than text for a name.
    """
    where = f'{source}: ' if source else ''
    converted: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f'{where}The name of a tensor is {key!r:.100}, no text.')
        name = convert_key(key)
        if name in converted:
            raise CheckpointError(
                f'{where}{sources[name]} and {key} are both {name}; the file mixes two layouts.'
            )
        converted[name] = value
        sources[name] = key
    return converted


# --- What a set of tensors is --------------------------------------------------


def describe(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the network off the names and shapes of its tensors.

    Args:
        state_dict: In any of the layouts.

    Returns:
        ``arch`` (embed_dims, depths and ffn_ratios), ``attention``,
        ``kernel_size`` (a list only where the stages differ) and
        ``in_channels`` of `LSKAVAN`; None if these are not the tensors of one.
    """
    shapes = {
        convert_key(key).removeprefix('backbone.'): tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, Tensor) and value.dim() == 4 and value.numel()
    }
    gate = _read_gate(shapes, 1)
    if gate is None or 'patch_embed1.proj.weight' not in shapes:
        return None
    stages = 1
    while f'patch_embed{stages + 1}.proj.weight' in shapes:
        stages += 1
    depths = [
        len({key.split('.')[1] for key in shapes if key.startswith(f'block{i + 1}.')})
        for i in range(stages)
    ]
    embed_dims = [shapes[f'patch_embed{i + 1}.proj.weight'][0] for i in range(stages)]
    hidden = [shapes.get(f'block{i + 1}.0.mlp.fc1.weight', (0,))[0] for i in range(stages)]
    ffn_ratios = [h // dim for h, dim in zip(hidden, embed_dims)]
    # A stage whose gate is damaged is described like the first.
    kernel_sizes = [(_read_gate(shapes, i + 1) or gate)[1] for i in range(stages)]
    return dict(
        arch=dict(embed_dims=embed_dims, depths=depths, ffn_ratios=ffn_ratios),
        attention=gate[0],
        kernel_size=kernel_sizes[0] if len(set(kernel_sizes)) == 1 else kernel_sizes,
        in_channels=shapes['patch_embed1.proj.weight'][1],
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
    """The name of an arch in the zoo, also of its first stages alone."""
    from .models.lska_van import ARCHS  # not at the top: it imports this module

    stages = len(arch['depths'])
    for name, known in ARCHS.items():
        if all(list(arch[key]) == values[:stages] for key, values in known.items()):
            return name
    return None


# What a part of a model tells of the whole.
_KINDS = dict(
    decode_head='a segmentor',
    rpn_head='a detector',
    roi_head='a detector',
    bbox_head='a detector',
    mask_head='a detector',
    head='a classifier',
    backbone='a backbone',
)


def _signature(state_dict: Mapping[str, Any]) -> str | None:
    """The call that builds the network of these tensors."""
    description = describe(state_dict)
    if description is None:
        return None
    arch = arch_name(description['arch']) or description['arch']
    rest = ', '.join(f'{k}={v!r}' for k, v in description.items() if k != 'arch')
    return f'LSKAVAN(arch={arch!r}, {rest})'


def summarize(state_dict: Mapping[str, Any]) -> str:
    """Say in words what tensors are: whose model, of which backbone and parts."""
    parts = {convert_key(key).split('.')[0] for key in state_dict}
    kind = next((kind for part, kind in _KINDS.items() if part in parts), 'a model')
    named = [_signature(state_dict) or part if part == 'backbone' else part for part in parts]
    return f'{kind} ({", ".join(sorted(named)) or "no tensors"})'


# --- Into a model --------------------------------------------------------------


def unwrap(model: Any) -> Any:
    """The model itself, without DDP or test-time augmentation around it."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def check_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], source: str, allow_extra: bool = False
) -> None:
    """Compare tensors, in any layout, with the model that they are to be loaded into.

    MMEngine loads what fits and warns about the rest, which would then be random.

    Args:
        model: Bare or wrapped.
        state_dict: What is to be loaded.
        source: The file that it is from.
        allow_extra: Whether there may be tensors that the model does not have.

    Raises:
        CheckpointError: If the tensors are not those of the model; says what they are.
    """
    expected = {convert_key(key): value for key, value in model.state_dict().items()}
    found = convert_state_dict(state_dict, source)
    if allow_extra:
        found = {key: value for key, value in found.items() if key in expected}
    # FSDP gathers the tensors on one rank alone; on the others there is nothing to compare.
    problem = _compare(found, expected) if expected else None
    if problem:
        raise CheckpointError(
            f'{source} cannot be loaded into the {type(unwrap(model)).__name__} of the config: '
            f'{problem}. The file holds {summarize(state_dict)}.'
        )


# --- Into the backbone ---------------------------------------------------------


def adapt_state_dict(backbone: 'LSKAVAN', state_dict: dict[str, Any], prefix: str) -> None:
    """Give the tensors of a backbone in ``state_dict`` its own names, in place.

    What follows ``prefix`` may be in any layout. What is not the backbone's (a
    head, a neck, stages that it did not build) is dropped.

    Raises:
        CheckpointError: If the tensors are not exactly the backbone's, so that
            a part of it would be left random or a part of them unused.
    """
    offered = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    converted = convert_state_dict({key[len(prefix) :]: v for key, v in offered.items()})
    found = {
        key.removeprefix('backbone.'): value
        for key, value in converted.items()
        if key.startswith('backbone.')
    }
    built = {
        key: value
        for key, value in found.items()
        if int(re.findall(r'\d+', key)[0]) <= backbone.num_stages
    }
    expected = backbone.state_dict()
    problem = _compare(built, expected)
    if problem:
        theirs, ours = _signature(found), _signature(expected)
        names = ', '.join(list(offered)[:3]) or 'none'
        offer = (
            f'The weights are of {theirs}'
            if theirs
            else f'No LSKA-VAN among the {len(offered)} tensors offered (first: {names})'
        )
        wanted = 'as this backbone is, but' if theirs == ours else f'this backbone is {ours}:'
        tools = 'resize_kernel.py and van2lska.py in tools/model_converters do'
        how = '' if theirs in (None, ours) else f' ({tools})'
        raise CheckpointError(
            f'{offer}, {wanted} {problem}. '
            f'Nothing was loaded: change the backbone in the config, or the checkpoint{how}.'
        )
    state_dict.update((prefix + key, value) for key, value in built.items())


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What keeps the tensors found from being those expected, in words.

    Half and double precision are welcome, as long as the numbers stay finite.
    """
    strangers = [k for k, v in found.items() if not isinstance(v, Tensor)]
    if strangers:
        return f'{len(strangers)} of them are no tensors (first: {strangers[0]})'
    missing = [k for k in expected if k not in found and not k.endswith('num_batches_tracked')]
    extra = [k for k in found if k not in expected]
    shapes = {
        k: (tuple(found[k].shape), tuple(expected[k].shape))
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    }
    if missing:
        return f'{len(missing)} tensors are missing (first: {missing[0]})'
    if extra:
        return f'{len(extra)} tensors have no place (first: {extra[0]})'
    for key, (ours, theirs) in shapes.items():
        return (
            f'{len(shapes)} tensors differ in shape (first: {key}, found {ours}, '
            f'expected {theirs})'
        )
    kinds = {
        k: f'{found[k].dtype}, expected {expected[k].dtype}'
        for k in expected
        if k in found and not _is_of_kind(found[k], expected[k])
    }
    for key, dtypes in kinds.items():
        return f'{len(kinds)} tensors hold another kind of numbers (first: {key}, found {dtypes})'
    wrong = [
        k for k in expected if k in found and not found[k].to(expected[k].dtype).isfinite().all()
    ]
    if wrong:
        return (
            f'{len(wrong)} of {len(found)} tensors hold NaN or infinity (first: {wrong[0]}), as '
            'after a training that diverged; take an earlier checkpoint'
        )
    return None


def _is_of_kind(found: Tensor, expected: Tensor) -> bool:
    """Whether both are real, or counts: those may have been through half precision."""
    if expected.is_floating_point() or found.is_complex():
        return found.is_floating_point() and expected.is_floating_point()
    return bool((found == found.long()).all())
