"""LSKA-VAN backbones for OpenMMLab.

Importing the package registers its modules in MMEngine's root registry, where mmdet,
mmseg and mmpretrain find them without a prefix, and its checkpoint readers:

    custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
"""

from difflib import get_close_matches
from pathlib import Path

from mmengine.runner import CheckpointLoader

from .engine.distributed import CPUDistributedDataParallel
from .engine.hooks import CheckLabelsHook, CompileHook, SaveOnSignalHook
from .engine.optim import LayerDecayOptimWrapperConstructor
from .models.lska import LSKA
from .models.lska_neck import LSKANeck
from .models.lska_van import LSKAVAN
from .weights.loader import load_from_http, load_from_local
from .weights.pretrained import ResizedPretrained

__version__ = '0.2.0'
__all__ = [
    'LSKA',
    'LSKAVAN',
    'CPUDistributedDataParallel',
    'CheckLabelsHook',
    'CompileHook',
    'LSKANeck',
    'LayerDecayOptimWrapperConstructor',
    'ResizedPretrained',
    'SaveOnSignalHook',
    'config',
    'load_from_http',
    'load_from_local',
]

# `force` replaces MMEngine's own readers, which run a refused pickle after all.
CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
CheckpointLoader.register_scheme(
    prefixes=('http://', 'https://'), loader=load_from_http, force=True
)


def config(name: str) -> str:
    """Return the path of a config of this package, to use as a base.

    In a config in any folder:

        _base_ = __import__('lska_mm').config('detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py')

    Args:
        name: Path of the config below `configs/`.

    Raises:
        FileNotFoundError: If there is no such config; lists the nearest.
    """
    folder = Path(__file__).parent / '.mim/configs'  # made by setup.py
    path = folder / name
    if not path.is_file():
        known = [str(path.relative_to(folder)) for path in folder.rglob('*.py')]
        if not known:
            raise FileNotFoundError(f'{folder} is empty: run `pip install -e .` in the clone.')
        nearest = get_close_matches(name, known, n=3, cutoff=0)
        raise FileNotFoundError(
            f'lska_mm has no config {name}; the nearest are {", ".join(nearest)}.'
        )
    return str(path)
