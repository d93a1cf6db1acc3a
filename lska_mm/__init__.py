"""LSKA-VAN backbones for OpenMMLab.

Importing the package registers everything it offers in MMEngine's root
registry, where mmdet, mmseg and mmpretrain find it without a prefix, and makes
MMEngine read checkpoints through `lska_mm.loader` and write local files through
`WholeFileBackend`:

    custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
"""

import mmengine.runner.checkpoint
from mmengine.config import Config
from mmengine.fileio import register_backend
from mmengine.runner import CheckpointLoader

from .configs import get_cfg_path
from .data import BadImagesHook, GuardedDataset, SeededBatches
from .files import WholeFileBackend
from .hooks import CheckLabelsHook, CheckWeightsHook, NonFiniteHook
from .kernels import ResizedPretrained
from .loader import load_from_local, load_from_url
from .models import LSKA, LSKAVAN, LSKANeck
from .optim import AutocastOptimWrapper, LayerDecayOptimWrapperConstructor
from .resume import DueValidationHook, ExactResumeHook, WholeCheckpointHook
from .signals import SaveOnSignalHook

__version__ = '0.1.0'
__all__ = [
    'LSKA',
    'LSKAVAN',
    'AutocastOptimWrapper',
    'BadImagesHook',
    'CheckLabelsHook',
    'CheckWeightsHook',
    'DueValidationHook',
    'ExactResumeHook',
    'GuardedDataset',
    'LSKANeck',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteHook',
    'ResizedPretrained',
    'SaveOnSignalHook',
    'SeededBatches',
    'WholeCheckpointHook',
    'WholeFileBackend',
    'load_from_local',
]

# `force`, because MMEngine has a reader of local files of its own: one that
# answers a refused pickle by running it.
CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
# And a backend that leaves half a file behind when it is interrupted.
register_backend('local', WholeFileBackend, prefixes='', force=True)
# Beneath its readers of URLs, which share the downloads among processes.
mmengine.runner.checkpoint.load_url = load_from_url
# For `_base_ = 'lska_mm::...'` in configs elsewhere.
Config._get_cfg_path = staticmethod(get_cfg_path)
