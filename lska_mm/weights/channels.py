"""Another number of image channels: grey, RGB-D, four bands and more."""

from collections.abc import Mapping
from typing import Any

import torch

from .gate import read_state
from .names import CheckpointError

_KEY = 'backbone.patch_embed1.proj.weight'


@torch.no_grad()
def resize_channels(state_dict: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """Change the number of image channels that the first convolution takes.

    For one channel its weights are summed, so that a grey image gives what it gave as
    three equal channels. For others they are repeated in turn and rescaled by the ratio of
    the numbers, as timm does: equal channels give the same where one number is a multiple
    of the other.

    Args:
        state_dict: Of a backbone for 1 or 3 channels, or a model that has one, in any layout.
        in_channels: Of `LSKAVAN`.

    Returns:
        The tensors, under this package's names.

    Raises:
        CheckpointError: If these are not the tensors of an LSKA-VAN for 1 or 3 channels.
        ValueError: If ``in_channels`` is less than 1.
    """
    state, description = read_state(state_dict)
    found = description['in_channels']
    if in_channels < 1:
        raise ValueError(f'in_channels={in_channels} is less than 1.')
    if in_channels == found:
        return state
    if found not in (1, 3):
        raise CheckpointError(
            f'The weights are for images of {found} channels; only those for 1 or 3 can be '
            f'resized, to in_channels={in_channels} or any other number.'
        )
    weight = state[_KEY]  # (C, found, height, width)
    if in_channels == 1:
        state[_KEY] = weight.sum(1, keepdim=True)
    else:
        turns = torch.arange(in_channels) % found
        state[_KEY] = weight[:, turns] * (found / in_channels)
    return state
