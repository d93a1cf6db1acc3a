"""The configs that come with the package, as bases of configs elsewhere.

In a config of any folder, wherever the package was installed from:

    _base_ = 'lska_mm::detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py'
"""

from pathlib import Path

from mmengine.config import Config

# Of the repository, in wheels a copy of them.
FOLDER = Path(__file__).parent / '.mim/configs'
_mmengine_get_cfg_path = Config._get_cfg_path


def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
    """The path of a base, and the scope that its types are looked up in, if it has one.

    Stands in for MMEngine's own, which takes ``NAME::`` only of the packages that it
    lists, and would look for the types of mmdet, mmseg and mmpretrain in a registry
    of that name.

    Args:
        cfg_path: The base, as the config says it.
        filename: The config.

    Raises:
        FileNotFoundError: If the package has no such config.
    """
    package, _, name = cfg_path.partition('::')
    if package != 'lska_mm' or not name:
        return _mmengine_get_cfg_path(cfg_path, filename)
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f'{cfg_path}: no such config in {FOLDER}.')
    return str(path), None
