"""Layer-wise learning-rate decay."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with smaller rates for earlier layers.

    For any model whose ``backbone`` has ``get_layer_depth``. mmpretrain's constructor
    needs that method on the whole model, which only classifiers have; those of mmdet
    and mmseg only accept a few backbones, by class name. In a config:

        optim_wrapper = dict(
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0))

    ``layer_decay_rate``, above 0 and at most 1, is the ratio between the
    learning rates of a layer and the next; what follows the backbone keeps the
    optimizer's rate. The other keys of ``paramwise_cfg`` work as in MMEngine's
    constructor; their factors multiply.

    Raises:
        ValueError: If the rate is missing or out of range, or the optimizer
            has no ``lr``.
        TypeError: If the model's backbone has no ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if self.base_lr is None:
            raise ValueError('Layer-wise decay needs lr=... in optim_wrapper.optimizer.')
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                'paramwise_cfg needs a layer_decay_rate above 0 and at most 1, '
                f'got layer_decay_rate={rate!r}.'
            )

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs):
        """Add a group for each parameter of ``module`` to ``params``."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # a recursive call, for a part of the model
            return
        backbone = getattr(module, 'backbone', None)
        if backbone is None or not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                f'{type(self).__name__} needs model.backbone.get_layer_depth; '
                f'{type(module).__name__} has a backbone of {type(backbone).__name__}.'
            )
        names = {parameter: name for name, parameter in module.named_parameters()}
        rate = self.paramwise_cfg['layer_decay_rate']
        for group in params:
            (parameter,) = group['params']
            layer, num_layers = backbone.get_layer_depth(names[parameter], 'backbone.')
            decay = rate ** (num_layers - 1 - layer)
            group['lr'] = group.get('lr', self.base_lr) * decay
            group.update(layer_id=layer, lr_scale=decay, param_name=names[parameter])
        rates = [group['lr'] for group in params]
        print_log(
            f'Layer-wise learning-rate decay of {rate} over {num_layers} layers: '
            f'learning rates from {min(rates):.3g} to {max(rates):.3g}',
            logger='current',
        )
