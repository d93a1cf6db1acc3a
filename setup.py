"""Install the plugin alone; extras bring a whole stack.

pip install -e .                into an environment that has OpenMMLab
pip install -e '.[onedl]'       with the maintained forks (see README: mmcv
pip install -e '.[openmmlab]'   must be compiled with its ops beforehand)
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r"__version__ = '(.+)'", (root / 'lska_mm/__init__.py').read_text())[1]


def pins(name):
    lines = (root / f'requirements/{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def add_mim_extension():
    """Put configs, tools and model index where mim and `lska_mm.config` look for them.

    Links, so that a clone that is installed by `pip install -e .` follows its own files; copies
    where the system allows no links, as Windows does by default.
    """
    folder = root / 'lska_mm/.mim'
    folder.mkdir(exist_ok=True)
    for name in ('configs', 'tools', 'model-index.yml'):
        source, target = root / name, folder / name
        if not source.exists() or target.is_symlink():  # an unpacked sdist brings copies
            continue
        try:
            target.symlink_to(f'../../{name}', target_is_directory=source.is_dir())
        except OSError:  # not allowed, or there is an older copy
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copyfile(source, target)


add_mim_extension()
setup(
    name='lska_mm',
    version=version,
    description='LSKA-VAN backbones for MMDetection, MMSegmentation and MMPreTrain',
    long_description=(root / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    project_urls={
        'Paper': 'https://arxiv.org/abs/2309.01439',
        'Weights': 'https://github.com/StevenLauHKHK/Large-Separable-Kernel-Attention',
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['lska_mm*']),
    # nuclei.py converts what only a clone has, demo/nuclei.
    package_data={
        'lska_mm': ['py.typed', '.mim/model-index.yml', '.mim/configs/**', '.mim/tools/**']
    },
    exclude_package_data={'lska_mm': ['.mim/tools/dataset_converters/nuclei.py']},
    python_requires='>=3.10',
    # torch, mmengine and mmcv are needed but not asked for here: the two stacks
    # call them by different names, and pip would install one beside the other.
    install_requires=[],
    extras_require={name: pins(name) for name in ('onedl', 'openmmlab', 'tests')},
)
