"""Identify the network that tensors are of, and compare them with a model.

MMEngine loads with ``strict=False``: a wrong layout or kernel size leaves random
weights and a warning, which `adapt_state_dict` turns into an error.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..models.archs import ARCHS
from .names import CheckpointError, convert_key, convert_state_dict, from_file, get_state_dict

_VAN = re.compile(r'(?:backbone\.)?((?:patch_embed|block|norm)(\d+)\..+)')
# Names that every VAN has, and no subclass adds.
_PUBLISHED = re.compile(
    r'(norm\d+|patch_embed\d+\.(proj|norm)|block\d+\.\d+\.(norm[12]|layer_scale_[12]|shortcut|'
    r'attn\.(proj_[12]|spatial_gating_unit\.\w+)|mlp\.(fc[12]|dwconv)))(\.[^.]+)?'
)

# --- Identification ------------------------------------------------------------


def describe(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Infer the network from the names, in any layout, and shapes of its tensors.

    Returns:
        ``arch`` (a dict), ``attention``, ``kernel_size`` (a list only where the stages
        differ), ``in_channels`` and, where unusual, ``patch_sizes`` and ``deploy`` of
        `LSKAVAN`, which build a network of these shapes; None if it is not an LSKA-VAN.
    """
    shapes = {
        convert_key(key).removeprefix('backbone.'): tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, Tensor) and value.dim() > 2 and value.numel()
    }
    gate = _read_gate(shapes, 'block1.')
    if gate is None or 'patch_embed1.proj.weight' not in shapes:
        return None
    stages = list[tuple]()
    while patch := shapes.get(f'patch_embed{len(stages) + 1}.proj.weight'):
        block, width = f'block{len(stages) + 1}.', patch[0]
        depth = len({key.split('.')[1] for key in shapes if key.startswith(block)})
        hidden = shapes.get(f'{block}0.mlp.fc1.weight', patch)[0]
        ratio = hidden / width
        if int(width * ratio) < hidden:  # as the network rounds down
            ratio = math.nextafter(ratio, math.inf)
        # A stage whose gate is damaged is described like the first.
        size = (_read_gate(shapes, block) or gate)[1]
        stages.append((width, depth, int(ratio) if ratio.is_integer() else ratio, size, patch[-1]))
    embed_dims, depths, ffn_ratios, sizes, patch_sizes = map(list, zip(*stages))
    usual = patch_sizes == [7, 3, 3, 3][: len(stages)]
    return dict(
        arch=dict(embed_dims=embed_dims, depths=depths, ffn_ratios=ffn_ratios),
        attention=gate[0],
        kernel_size=sizes[0] if len(set(sizes)) == 1 else sizes,
        in_channels=shapes['patch_embed1.proj.weight'][1],
        **({} if usual else dict(patch_sizes=patch_sizes)),
        **(dict(deploy=True) if 'block1.0.shortcut' in shapes else {}),
    )


def _read_gate(shapes: Mapping[str, tuple], blocks: str) -> tuple[str, int] | None:
    """Return ``attention`` and ``kernel_size`` of a stage."""
    gate = f'{blocks}0.attn.spatial_gating_unit.'
    names = ('conv0', 'conv0h', 'conv_spatial', 'conv_spatial_h')
    sides = {name: shapes[f'{gate}{name}.weight'][-1] for name in names
             if f'{gate}{name}.weight' in shapes}  # fmt: skip
    if len(sides) not in (1, 2):
        return None
    attention = 'LSKA' if 'conv0h' in sides else 'LKA'
    local, *far = sides.values()
    if not far:
        return f'{attention}-trivial', local
    # The first pair is 2 * dilation - 1 long, see `lska_mm.models.lska`.
    return attention, local + (local + 1) // 2 * (far[0] - 1)


def signature(state_dict: Mapping[str, Any]) -> str:
    """Return the call that builds the network of these tensors, except for its norms."""
    description = describe(state_dict)
    if description is None:
        names = ', '.join(list(state_dict)[:3]) or 'none'
        return f'no LSKA-VAN ({len(state_dict)} tensors, first: {names})'
    arch, stages = description['arch'], len(description['arch']['depths'])
    for name, known in ARCHS.items():  # or only its first stages
        if arch == {key: values[:stages] for key, values in known.items()}:
            description['arch'] = name
            break
    return f'LSKAVAN({", ".join(f"{key}={value!r}" for key, value in description.items())})'


def read_state(
    state_dict: Mapping[str, Any], source: str = 'The file'
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tensors under this package's names, and what `describe` says of them.

    The norms may be of any kind, with the same tensors in all blocks and stages. There may
    be tensors of a subclass's own modules.

    Raises:
        CheckpointError: If there is no LSKA-VAN among them, or only a part of one; if shapes
            do not fit each other; if a tensor has NaN or infinity.
    """
    state = convert_state_dict(state_dict, source)
    description = describe(state)
    if description is None:
        raise CheckpointError(f'{source} holds {signature(state)}.')
    try:
        with torch.device('meta'):
            backbone = MODELS.build(dict(type='LSKAVAN', **description, out_indices=[-1]))
    except ValueError as error:  # kernel sizes that no gate has
        raise CheckpointError(f'{source} holds no LSKA-VAN: {error}') from None
    found = {key: value for key, value in first_stages(state, len(state)).items()
             if _PUBLISHED.fullmatch(key)}  # fmt: skip
    norms = {name: norm.weight for name, norm in backbone.named_modules()
             if isinstance(norm, (nn.BatchNorm2d, nn.LayerNorm))}  # fmt: skip
    expected = {key: value for key, value in backbone.state_dict().items()
                if key.rpartition('.')[0] not in norms}  # fmt: skip
    kinds = defaultdict(set)  # the tensors that norms have in the file
    for key in found:
        kinds[re.sub(r'\d', '', key.rpartition('.')[0])].add(key.rpartition('.')[2])
    for norm, like in norms.items():
        for name in sorted(kinds[re.sub(r'\d', '', norm)]):
            value = found.get(f'{norm}.{name}')
            expected[f'{norm}.{name}'] = value if getattr(value, 'ndim', 1) != 1 else like
    problem = compare(found, expected)
    if problem:
        raise CheckpointError(f'{source} holds no complete {signature(state)}: {problem}.')
    return state, description


def first_stages(state: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """Return the tensors of a VAN's first stages, without ``backbone.`` in front."""
    matches = ((_VAN.fullmatch(key), value) for key, value in state.items())
    return {match[1]: value for match, value in matches if match and int(match[2]) <= stages}


# --- Loading -------------------------------------------------------------------


def unwrap(model: Any) -> Any:
    """Return the model itself, without DDP or test-time augmentation around it."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def load_whole(model: nn.Module, checkpoint: Any, source: str) -> None:
    """Load a checkpoint into a model, bare or wrapped, of which no part may stay random.

    Tensors under other names than the model's are ignored.

    Raises:
        CheckpointError: If tensors are missing or have other shapes; says what the
            file ``source`` holds.
    """
    model = unwrap(model)
    state_dict = get_state_dict(checkpoint)
    tensors = {re.sub(r'^(module\.)+', '', str(key)): v for key, v in state_dict.items()}
    tensors = from_file(tensors, '')
    try:
        missing = model.load_state_dict(tensors, strict=False).missing_keys
        problem = f'{len(missing)} tensors are missing (first: {missing[0]})' if missing else ''
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip().rstrip('.')
    if problem:
        alone = [name for name, _ in model.named_children()] == ['backbone']
        kind = 'backbone' if alone else type(model).__name__
        raise CheckpointError(
            f'{source} cannot be loaded into the {kind} of the config: '
            f'{problem}. The file holds {_summarize(tensors)}.'
        )


def _summarize(state_dict: Mapping[str, Any]) -> str:
    """Describe in words which backbone and other parts tensors are of."""
    parts = {convert_key(key).partition('.')[0] for key in state_dict}
    if describe(state_dict):
        parts = parts - {'backbone'} | {signature(state_dict)}
    return ', '.join(sorted(parts)) or 'no tensors'


def adapt_state_dict(
    backbone: Any, state_dict: dict[str, Any], prefix: str, refuse: bool, file: str = ''
) -> None:
    """Rename the tensors of a backbone in ``state_dict`` to its own names, in place.

    Tensors under ``prefix``, in any layout, are the backbone's; those of other parts of a model
    (a head, a neck) and of later stages are dropped, unknown ones are left to PyTorch. Tensors
    of modules that a subclass adds, in blocks too, are optional.

    Raises:
        CheckpointError: If ``refuse`` and a part of the backbone would be left random, or a
            part of the tensors unused; starts with ``file``, the source of the tensors.
    """
    own = backbone.state_dict()
    expected = first_stages(own, backbone.num_stages)
    offered = {key[len(prefix) :]: state_dict.pop(key)
               for key in list(state_dict) if key.startswith(prefix)}  # fmt: skip
    found = first_stages(convert_state_dict(offered), backbone.num_stages)
    problem = compare(found, expected) if refuse else None
    if problem:
        where = ', '.join(filter(None, (file, prefix.rstrip('.'))))
        raise CheckpointError(
            f'{where}{": " if where else ""}{_explain(found, expected, offered, problem)} '
            'Nothing was loaded.'
        )
    names = {re.sub(r'^(module\.)+', '', key): value for key, value in offered.items()}
    of_model = any(name.startswith('backbone.') for name in names)
    added = {key.partition('.')[0] for key in own.keys() - expected.keys()}
    for name, value in names.items():
        own_name = name.removeprefix('backbone.')
        part = own_name.partition('.')[0]
        others = name == own_name if of_model else part == 'head'
        if part in added or not (others or _VAN.fullmatch(convert_key(name))):
            state_dict[prefix + own_name] = value
    state_dict.update((prefix + key, value) for key, value in found.items())


def compare(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str | None:
    """Describe the first kind of difference between tensors; None if there is none."""

    def problems() -> Iterator[tuple[str, list[str]]]:
        others = [key for key, value in found.items() if not isinstance(value, Tensor)]
        yield 'are not of type Tensor', others
        needed = (
            key for key in expected if _PUBLISHED.fullmatch(key) and 'num_batches' not in key
        )
        yield 'are missing', [key for key in needed if key not in found]
        yield 'are unexpected', [key for key in found if key not in expected]
        pairs = [(key, found[key], expected[key]) for key in expected if key in found]
        yield 'differ in shape', [f'{key}, found {tuple(a.shape)}, expected {tuple(b.shape)}'
                                  for key, a, b in pairs if a.shape != b.shape]  # fmt: skip
        yield (
            'hold NaN or infinity, as after a training that diverged',
            [key for key, a, b in pairs if not a.to(b.dtype).isfinite().all()],
        )

    for problem, keys in problems():
        if keys:
            return f'{len(keys)} tensors {problem} (first: {keys[0]})'
    return None


def _explain(found: Mapping, expected: Mapping, offered: Mapping, problem: str) -> str:
    """Describe the tensors and the backbone, and say what to change."""
    weights, backbone = describe(found) or {}, describe(expected) or {}
    differ = {key for key in weights | backbone if weights.get(key) != backbone.get(key)}
    kind = f'The weights are {signature(found if weights else offered)}'
    if not differ:
        return f'{kind}, like this backbone, but {problem}.'
    advice = 'Change the backbone in the config, or the checkpoint'
    if differ <= {'kernel_size', 'attention', 'in_channels'} | ({'deploy'} - weights.keys()):
        advice += ' (with a tool in tools/model_converters)'
    if differ <= {'kernel_size', 'in_channels'}:
        advice += ", or use init_cfg=dict(type='ResizedPretrained')"
    return f'{kind}, this backbone is {signature(expected)}: {problem}. {advice}.'
