"""Every command and every block of Python in README and docs runs.

They run in a copy of the repository that has, under the names that the texts
use, the embedded data instead of COCO and reference weights instead of the
published ones; options are added that make them short.
"""

import json
import re
import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, VISBACKENDS, init_default_scope

from conftest import ROOT, copy_repository
from documented import CLASSIFIER, COMMANDS, SEGMENTATION, SEGMENTOR, VAN


def blocks(text, language):
    """Blocks of code, each with the file name that stands before it, if any."""
    return re.findall(
        rf'(?:[Ii]n (?:a file )?`([\w.]+)`:\s+)?^```{language}\n(.*?)^```',
        (ROOT / text).read_text(),
        re.DOTALL | re.MULTILINE,
    )


def commands(text):
    """Commands, without comments; a variable's line belongs to the next command."""
    lines = [line for _, block in blocks(text, 'bash') for line in block.splitlines()]
    return [line.split('  #')[0].strip() for line in lines]


SHAPES = ('airplane', 'bear', 'bicycle', 'bird', 'boat', 'bottle', 'car', 'cat', 'chair', 'clock',
          'dog', 'elephant', 'keyboard', 'knife', 'oven', 'truck')  # fmt: skip


@pytest.fixture(scope='module')
def project(coco, published_file, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    copy_repository(folder)
    run('python', 'setup.py', '--version', cwd=folder)  # makes .mim
    shutil.copytree(coco, folder / 'data/coco')
    shutil.copytree(coco, folder / 'data/pets')
    for path in (folder / 'data/pets').glob('annotations/*.json'):
        path.write_text(path.read_text().replace('"category_id": 1,', '"category_id": 16,'))
    run('python', 'tools/dataset_converters/nuclei.py', '--out', 'data/nuclei', cwd=folder)
    run('python', 'tools/dataset_converters/digits.py', '--out', 'data/digits', cwd=folder)
    shutil.copytree(published_file.parent, folder / 'pretrained')
    shutil.copy(ROOT / 'demo/nuclei/image.png', folder / 'image.png')

    init_default_scope('mmpretrain')
    van = MODELS.build(dict(type='VAN', arch='tiny'))
    tensors = {f'backbone.{key}': value for key, value in van.state_dict().items()}
    torch.save(dict(state_dict=tensors), folder / 'pretrained' / VAN)

    # The 16 classes of cue-conflict, each with the texture of the next.
    for shape, texture in zip(SHAPES, [*SHAPES[1:], SHAPES[0]]):
        path = folder / f'data/cue-conflict/{shape}/{shape}1-{texture}2.png'
        path.parent.mkdir(parents=True)
        shutil.copy(ROOT / 'demo/nuclei/image.png', path)

    # What two demos, demo/pretraining.sh and demo/shape_bias.sh leave behind.
    for config, path in (('demo/lska-van-tiny_digits.py', CLASSIFIER), (SEGMENTATION, SEGMENTOR)):
        cfg = Config.fromfile(ROOT / config)
        init_default_scope(cfg.default_scope)
        (folder / path).parent.mkdir(parents=True)
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / path)
    decisions = folder / 'work_dirs/shape_bias/csv/k7.csv'
    decisions.parent.mkdir(parents=True)
    decisions.write_text('subj,object_response,category,imagename\nk7,bear,bear,bear1-car2.png\n')
    for setting, seed, score in (('digits', 0, 0.1), ('digits', 1, 0.3), ('random', 0, 0.2)):
        log = folder / f'work_dirs/pretraining/{setting}/seed-{seed}/now/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({'coco/segm_mAP': score, 'step': 2}))
    return folder


def test_every_text_is_known():
    texts = ['README.md', *(str(path.relative_to(ROOT)) for path in ROOT.glob('docs/*.md'))]
    assert sorted(texts) == sorted(COMMANDS)


@pytest.mark.parametrize('text', COMMANDS)
def test_every_command_is_known(text):
    found = [line for line in commands(text) if not re.match(r'[A-Z]+=\S*\$\(', line)]
    assert sorted(found) == sorted(COMMANDS[text])


@pytest.fixture(scope='module')
def done():
    """Commands that have run; what two texts have is run once."""
    return set()


@pytest.mark.parametrize('text', COMMANDS)
def test_commands(text, project, run, done):
    """In the order of the text; what a line sets is known to the next."""
    setting = ''
    for name, config in blocks(text, 'python'):
        if name:
            (project / name).write_text(config)
    for command in commands(text):
        if command not in COMMANDS[text]:
            setting = f'{command}; '
            continue
        if command in done:
            continue
        done.add(command)
        more, expected = COMMANDS[text][command]
        setting_used = setting if '$' in command else ''
        line = f'{setting_used}printf "%s\\n" {command}'
        words = run('bash', '-c', line, cwd=project).splitlines()
        printed = run(*words, *more, cwd=project, OMP_NUM_THREADS='1', PORT='29614')
        finish_trainings(project)
        assert expected in printed, f'{command} did not print {expected}'
    for name, code in blocks(text, 'python'):
        if re.search(r'^(from|import) ', code, re.MULTILINE):
            (project / 'block.py').write_text(code)
            assert run('python', 'block.py', cwd=project, OMP_NUM_THREADS='1')
        else:
            path = project / (name or 'fragment.py')
            path.write_text(code)
            check_config(path)


def finish_trainings(project):
    """Give the checkpoint after one epoch the name that the texts use, of the last epoch."""
    for path in project.glob('work_dirs/*/epoch_1.pth'):
        path.rename(path.with_name('epoch_12.pth'))


def check_config(path):
    """A config builds its model, optimizer, hooks and visualizer backends; a fragment, some."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    for hook in cfg.get('custom_hooks', []):
        assert HOOKS.build(hook)
    for backend in cfg.get('visualizer', {}).get('vis_backends', []):
        assert VISBACKENDS.build(dict(backend, save_dir=str(path.parent)))
    if 'model' in cfg:
        assert build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper)
