"""LSKA-VAN backbones for OpenMMLab.

Importing the package registers everything it offers in MMEngine's root
registry, where mmdet, mmseg and mmpretrain find it without a prefix, and makes
MMEngine read local checkpoints through `lska_mm.loader.load_from_local`:

    custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
"""

from mmengine.runner import CheckpointLoader

from .hooks import CheckLabelsHook
from .kernels import ResizedPretrained
from .loader import load_from_local
from .models import LSKA, LSKAVAN, LSKANeck
from .optim import LayerDecayOptimWrapperConstructor

__version__ = '0.1.0'
__all__ = [
    'LSKA',
    'LSKAVAN',
    'CheckLabelsHook',
    'LSKANeck',
    'LayerDecayOptimWrapperConstructor',
    'ResizedPretrained',
    'load_from_local',
]

# `force`, because MMEngine has a reader of local files of its own: one that
# answers a refused pickle by running it.
CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
