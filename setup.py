"""Install the plugin alone; extras bring a whole stack.

pip install -e .                into an environment that has OpenMMLab
pip install -e '.[onedl]'       with the maintained forks (see README: mmcv
pip install -e '.[openmmlab]'   must be compiled with its ops beforehand)
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r"__version__ = '(.+)'", (root / 'lska_mm/__init__.py').read_text())[1]


def pins(name):
    lines = (root / f'requirements/{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='lska_mm',
    version=version,
    description='LSKA-VAN backbones for MMDetection, MMSegmentation and MMPreTrain',
    long_description=(root / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['lska_mm*']),
    # Links to the folders beside the package, copied into wheels: `lska_mm.config`
    # looks there. nuclei.py converts what only a clone has, demo/nuclei.
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
