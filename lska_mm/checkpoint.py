"""Checkpoints: reading files safely, and any published layout to ours.

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

import os
import pickle
import re
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor

if TYPE_CHECKING:
    from .models import LSKAVAN

# torch's own names
FORCE_VARIABLE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
TRUST_VARIABLE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; says what was found and expected."""


# --- Names -------------------------------------------------------------------

# A tensor of the backbone, at the top of a file or behind `backbone.`.
_BACKBONE_KEY = re.compile(r'(?:backbone\.)?((?:patch_embed|blocks?|norm)\d+\..+)')
_RENAMES = (
    (r'^blocks(\d)', r'block\1'),
    (r'^(patch_embed\d+)\.projection\.', r'\1.proj.'),
    (r'\.dwconv\.dwconv\.', '.dwconv.'),
    (r'\.DW_D_conv(_[hv])?\.', r'.conv_spatial\1.'),
    (r'\.DW_conv_?([hv]?)\.', r'.conv0\1.'),
)
# The first convolution of a separable gate: no other network has one.
_SEPARABLE = re.compile(
    r'(?:module\.)*blocks?1\.0\.attn\.spatial_gating_unit\.'
    r'(?:conv0h|DW_conv_h)\.weight'
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


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename every tensor as `convert_key` says; drops and changes none.

    Raises:
        CheckpointError: If two tensors would get the same name.
    """
    converted: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value in state_dict.items():
        name = convert_key(key)
        if name in converted:
            raise CheckpointError(
                f'{sources[name]} and {key} are both {name}; the file mixes two layouts.'
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
        ``kernel_size`` and ``in_channels`` of `LSKAVAN`; None if these are not
        the tensors of one.
    """
    shapes = {
        convert_key(key).removeprefix('backbone.'): tuple(value.shape)
        for key, value in state_dict.items()
        if hasattr(value, 'shape')
    }
    gate = 'block1.0.attn.spatial_gating_unit.'
    convs = {
        name: shapes[f'{gate}{name}.weight'][-1]
        for name in ('conv0', 'conv0h', 'conv_spatial', 'conv_spatial_h')
        if f'{gate}{name}.weight' in shapes
    }
    if len(convs) not in (1, 2) or 'patch_embed1.proj.weight' not in shapes:
        return None
    local, *far = convs.values()
    # The first pair is 2 * dilation - 1 long, see `lska_mm.models.lska`.
    kernel_size = local + (local + 1) // 2 * (far[0] - 1) if far else local
    attention = 'LSKA' if 'conv0h' in convs else 'LKA'

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
    return dict(
        arch=dict(embed_dims=embed_dims, depths=depths, ffn_ratios=ffn_ratios),
        attention=attention if far else f'{attention}-trivial',
        kernel_size=kernel_size,
        in_channels=shapes['patch_embed1.proj.weight'][1],
    )


def arch_name(arch: Mapping[str, Any]) -> str | None:
    """The name of an arch in the zoo, also of its first stages alone."""
    from .models.lska_van import ARCHS  # not at the top: it imports this module

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
        theirs = _signature(found)
        names = ', '.join(list(offered)[:3]) or 'none'
        offer = (
            f'The weights are of {theirs}'
            if theirs
            else f'No LSKA-VAN among the {len(offered)} tensors offered (first: {names})'
        )
        raise CheckpointError(
            f'{offer}, this backbone is {_signature(expected)}: {problem}. '
            'Nothing was loaded: change the backbone in the config, or the checkpoint.'
        )
    state_dict.update((prefix + key, value) for key, value in built.items())


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What keeps the tensors found from being those expected, in words."""
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
    return None


# --- Reading files -------------------------------------------------------------


class _Refused(pickle.UnpicklingError):
    """Names what a pickle must not bring along."""


def _history_method(owner: type, name: str) -> Any:
    """Stands in for `getattr`, which MMEngine's logs are pickled with."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise _Refused(f'getattr({owner}, {name!r})')
    return getattr(HistoryBuffer, name)


_DTYPES_AND_STORAGES = ' '.join(
    name
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) or name.endswith('Storage')
)
_ALLOWED = {
    'builtins': 'bytearray complex dict float frozenset int list set slice str tuple',
    'collections': 'Counter OrderedDict defaultdict deque',
    'argparse': 'Namespace',
    '_codecs': 'encode',
    'mmengine.logging.history_buffer': 'HistoryBuffer',
    'numpy': 'dtype ndarray',
    'numpy.core.multiarray': '_reconstruct scalar',
    'numpy._core.multiarray': '_reconstruct scalar',
    'torch': f'Size device {_DTYPES_AND_STORAGES}',
    'torch._utils': '_rebuild_parameter _rebuild_tensor _rebuild_tensor_v2',
    'torch.nn.parameter': 'Parameter',
    'torch.storage': 'TypedStorage UntypedStorage',
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors, numbers and containers, and nothing that could act.

    torch's own ``weights_only`` reader takes no allow-list on torch 2.1 and
    could be made to run code there (CVE-2025-32434); this one reads alike on
    every version.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)
        if (module, name) == ('builtins', 'getattr'):
            return _history_method
        if name not in _ALLOWED.get(module, '').split():
            raise _Refused(f'{module}.{name}')
        return super().find_class(module, name)


def _load(file, **kwargs):
    return _Unpickler(file, **kwargs).load()


# What `torch.load` asks of a pickle module.
_RESTRICTED_PICKLE = types.ModuleType('restricted_pickle')
vars(_RESTRICTED_PICKLE).update(Unpickler=_Unpickler, load=_load)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '0').lower() in ('1', 'y', 'yes', 'true')


def load_from_local(path: str, map_location: Any = None) -> Any:
    """Read a checkpoint file without running code that it may carry.

    Registered with MMEngine as its reader of local files, so that it also
    serves ``Pretrained``, ``load_from``, ``--resume`` and `init_detector`. A
    file in the published layout comes back under this package's names, so
    that detectors and segmentors can start from it by its path alone.

    Args:
        path: A file that `torch.save` wrote.
        map_location: As for `torch.load`.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or holds objects other than
            tensors, numbers and containers. Setting the environment variable
            ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` trusts it all the same.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'No checkpoint at {path}. Put the weights there, or change the key that names '
            'them: model.backbone.init_cfg.checkpoint (init_cfg=None starts from random '
            'weights) or load_from. The configs take their weights from the folder '
            'in the environment variable LSKA_PRETRAINED, "pretrained" if it is not set.'
        )
    # Forced, torch reads by its own list of the harmless and takes no other.
    forced, trusted = _is_set(FORCE_VARIABLE), _is_set(TRUST_VARIABLE)
    pickle_module = None if forced or trusted else _RESTRICTED_PICKLE
    refusal = pickle.UnpicklingError if forced else _Refused
    try:
        checkpoint = torch.load(path, map_location, pickle_module, weights_only=forced)
    except refusal as error:
        raise CheckpointError(
            f'{path} was refused: it holds {error}, where only tensors, numbers, containers '
            'and argparse.Namespace are expected. Loading it could run code. If you trust '
            f'whoever made it, set {TRUST_VARIABLE}=1 for this one command.'
        ) from None
    except Exception as error:  # of any kind: the bytes may be anything
        raise CheckpointError(
            f'{path} is damaged, or not a file that torch.save wrote '
            f'({type(error).__name__}: {error}).'
        ) from error

    state_dict = get_state_dict(checkpoint)
    if any(_SEPARABLE.fullmatch(key) for key in state_dict if isinstance(key, str)):
        converted = convert_state_dict(state_dict)
        checkpoint = (
            {**checkpoint, 'state_dict': converted} if 'state_dict' in checkpoint else converted
        )
    return checkpoint


def get_state_dict(checkpoint: Any) -> Mapping[str, Tensor]:
    """The weights in a checkpoint: wrapped in ``state_dict``, or bare."""
    if not isinstance(checkpoint, Mapping):
        return {}
    state_dict = checkpoint.get('state_dict', checkpoint)
    return state_dict if isinstance(state_dict, Mapping) else {}
