"""Every command and every block of Python in README and docs runs.

They run in a copy of the repository that has, under the names that README
uses, the embedded data instead of COCO and reference weights instead of the
published ones; options are added that make them short.
"""

import re
import shutil
import subprocess

import pytest

from conftest import ROOT

SHORT = [
    '--cfg-options',
    *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
    'train_cfg.val_interval=12',
    'train_dataloader.dataset.pipeline.2.scale=(96,64)',
    'val_dataloader.dataset.pipeline.1.scale=(96,64)',
    'default_hooks.checkpoint.interval=12',
]
MASK_SHORT = [*SHORT, 'model.train_cfg.rcnn.sampler.num=16']
TEST_SHORT = [*SHORT[:7], 'test_dataloader.dataset.pipeline.1.scale=(96,64)']
MASK_RCNN = 'configs/detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py'
RETINANET = 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
CHECKPOINT = 'work_dirs/mask-rcnn_lska-van-tiny_fpn_1x_coco/epoch_12.pth'

# Command in README: what is added to it here, and what it must print. `make`
# only shows what it would do; the tests of demo/run.sh do it.
COMMANDS = {
    'make demo': (['-n'], 'TASK=detection bash demo/run.sh'),
    'make demo TASK=segmentation': (['-n'], 'TASK=segmentation bash demo/run.sh'),
    'make demo TASK=classification': (['-n'], 'TASK=classification bash demo/run.sh'),
    'python -m pydoc lska_mm.LSKAVAN': ([], 'drop_path_rate: Probability'),
    'make test': (['-n'], 'python -m pytest'),
    'pip install -e .': (['--dry-run', '--no-build-isolation'], 'Would install lska'),
    f'python tools/train.py {MASK_RCNN}': (MASK_SHORT, 'Epoch(val) [12][1/1]'),
    f'bash tools/dist_train.sh {RETINANET} 2': (SHORT, 'world size 2'),
    f'python tools/test.py {MASK_RCNN} {CHECKPOINT}': (TEST_SHORT, 'Epoch(test) [1/1]'),
    'python tools/convert_checkpoint.py pretrained/lska-van-tiny_k23_in1k.pth lska-van-tiny.pth': (
        [],
        'arch tiny, attention LSKA, kernel size 23',
    ),
}


def blocks(language):
    text = (ROOT / 'README.md').read_text()
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def commands():
    lines = [line for block in blocks('bash') for line in block.splitlines()]
    return [line.split('  #')[0].strip() for line in lines]


@pytest.fixture(scope='module')
def project(coco, published_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    files = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, text=True, capture_output=True, check=True
    )
    for name in files.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(coco, folder / 'data/coco')
    shutil.copytree(coco, folder / 'data/pets')
    for path in (folder / 'data/pets').glob('annotations/*.json'):
        path.write_text(path.read_text().replace('"category_id": 1,', '"category_id": 16,'))
    shutil.copytree(published_file.parent, folder / 'pretrained')
    shutil.copy(ROOT / 'demo/nuclei/image.png', folder / 'image.png')
    return folder


def test_every_command_is_known():
    assert sorted(commands()) == sorted(COMMANDS)


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: ' '.join(command.split()[:2]))
def test_command(command, project, run):
    more, expected = COMMANDS[command]
    printed = run(*command.split(), *more, cwd=project, OMP_NUM_THREADS='1', PORT='29613')
    assert expected in printed


def test_python_blocks(project, run):
    config, inference = blocks('python')
    assert len(config.splitlines()) <= 10
    (project / 'my_config.py').write_text(config)
    run('python', 'tools/train.py', 'my_config.py', *MASK_SHORT, cwd=project)
    assert len([line for line in inference.splitlines() if line]) <= 5
    printed = run('python', '-c', inference, cwd=project)
    assert 'tensor(' in printed


def test_local_links_lead_somewhere():
    links = re.findall(r'\]\(([^)]+)\)', (ROOT / 'README.md').read_text())
    local = [link for link in links if '://' not in link]
    assert len(local) >= 4
    assert not [link for link in local if not (ROOT / link).exists()]
