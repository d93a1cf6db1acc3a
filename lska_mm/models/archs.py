"""Architectures by name, and arguments with a value per stage."""

from collections.abc import Sequence
from typing import Any

_SIZES = {  # widths, depths, MLP ratios; names of the paper, mmpretrain and VAN
    'tiny t b0': ([32, 64, 160, 256], [3, 3, 5, 2], [8, 8, 4, 4]),
    'small s b1': ([64, 128, 320, 512], [2, 2, 4, 2], [8, 8, 4, 4]),
    'base b b2': ([64, 128, 320, 512], [3, 3, 12, 3], [8, 8, 4, 4]),
    'large l b3': ([64, 128, 320, 512], [3, 5, 27, 3], [8, 8, 4, 4]),
    'b4': ([64, 128, 320, 512], [3, 6, 40, 3], [8, 8, 4, 4]),
    'b5': ([96, 192, 480, 768], [3, 3, 24, 3], [8, 8, 4, 4]),
    'b6': ([96, 192, 384, 768], [6, 6, 90, 6], [8, 8, 4, 4]),
}
ARCHS = {
    name: dict(zip(('embed_dims', 'depths', 'ffn_ratios'), size))
    for names, size in _SIZES.items()
    for name in names.split()
}


def parse_arch(arch: str | dict) -> dict:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch={arch!r} is unknown; valid: {", ".join(ARCHS)}, '
                'or a dict of embed_dims, depths and ffn_ratios.'
            )
        return ARCHS[arch]
    keys = list(ARCHS['tiny'])
    if set(arch) != set(keys):
        raise ValueError(f'arch needs the keys {keys}, got {sorted(arch)}.')
    return {key: one_each(key, arch[key], len(arch['depths'])) for key in keys}


def one_each(name: str, value: Any, count: int, what: str = 'stages') -> list:
    """Return the values of an argument that is a list with one per stage, or one for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(
            f'{name}={values} has {len(values)} values; expected one for all, or one for each of '
            f'the {count} {what}.'
        )
    return values


def parse_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    valid = range(-num_stages, num_stages)
    if not out_indices or any(i not in valid for i in out_indices):
        raise ValueError(
            f'out_indices={tuple(out_indices)} is out of range; the '
            f'{num_stages} stages are 0 to {num_stages - 1}.'
        )
    return tuple(i % num_stages for i in out_indices)
