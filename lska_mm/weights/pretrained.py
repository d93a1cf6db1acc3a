"""Pretrained weights for another kernel size or number of image channels, in a config."""

from typing import Any

from mmengine.logging import print_log
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict

from .match import describe, first_stages, read_state
from .names import CheckpointError, convert_state_dict, from_file, get_state_dict
from .resize import resize_channels, resize_kernels, summarize_errors


@WEIGHT_INITIALIZERS.register_module()
class ResizedPretrained:
    """Initialize an `LSKAVAN` from weights of another kernel size or number of channels.

    In a config, where ``Pretrained`` would refuse the file:

        backbone=dict(kernel_size=53, init_cfg=dict(
            type='ResizedPretrained', checkpoint='pretrained/lska-van-tiny_k23_in1k.pth'))

    The weights are converted to the backbone's ``kernel_size`` and ``in_channels``.

    Args:
        checkpoint: File or URL of the weights, in any layout; not needed if the base
            config names one in ``init_cfg``.
        nearest: See `resize_kernels`.

    Raises:
        CheckpointError: See `resize_kernels` and `resize_channels`; if the weights differ
            from the backbone in anything else.
        TypeError: If it is the ``init_cfg`` of another module than an `LSKAVAN`.
    """

    def __init__(self, checkpoint: str, nearest: bool = False):
        self.checkpoint = checkpoint
        self.nearest = nearest

    def __call__(self, module: Any) -> None:
        """Load the weights into ``module``."""
        expected = describe(module.state_dict())
        if expected is None:
            raise TypeError(
                'ResizedPretrained is for the init_cfg of an LSKAVAN backbone, not of '
                f'{type(module).__name__}.'
            )
        checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, 'cpu', logger='current')
        tensors = convert_state_dict(get_state_dict(checkpoint), self.checkpoint)
        stages = first_stages(tensors, module.num_stages)
        state, found = read_state(stages or tensors, self.checkpoint)
        size, channels = expected['kernel_size'], expected['in_channels']
        if {**found, 'kernel_size': size, 'in_channels': channels} == expected:
            try:
                state = resize_channels(state, channels)
                state, errors = resize_kernels(state, size, self.nearest)
            except CheckpointError as error:
                raise CheckpointError(f'{self.checkpoint}: {error}') from None
            print_log(
                f'{self.checkpoint}: resized from kernel_size={found["kernel_size"]}, '
                f'in_channels={found["in_channels"]} to {size}, {channels}: '
                f'{summarize_errors(errors)}',
                logger='current',
            )
        load_state_dict(module, from_file(state, self.checkpoint), logger='current')
        if hasattr(module, '_params_init_info'):  # MMEngine's record of who set what
            update_init_info(module, f'ResizedPretrained: load from {self.checkpoint}')
