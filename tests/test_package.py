"""Installing, importing, and the shape of the package."""

import ast
import graphlib
import shutil
import zipfile
from importlib import metadata

import pytest
from mmengine.config import Config

import lska_mm
from conftest import ROOT, copy_repository


def test_importing_needs_no_toolbox(run):
    code = 'import lska_mm, sys; print(*sorted(sys.modules))'
    modules = run('python', '-c', code).split()
    assert 'mmengine' in modules
    assert not {'mmdet', 'mmseg', 'mmpretrain'} & set(modules)


UNCHANGED = """
import mmengine.config, mmengine.fileio, mmengine.registry, mmengine.runner
import mmengine.hooks, mmengine.logging, mmengine.model, mmengine.optim, mmengine._strategy
import mmcv.cnn, mmcv.transforms, torch, torch.distributed.fsdp, torch.hub, torch.serialization
import signal, sys

def look():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'torch', 'pickle', 'argparse', 'numpy'):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__.startswith(('mmengine', 'mmcv')):
                    found.update({(name, key, k): v for k, v in vars(value).items()})
    for key, registry in vars(mmengine.registry).items():
        if isinstance(registry, mmengine.registry.Registry):
            found.update({(key, name): kind for name, kind in registry.module_dict.items()})
    backends = mmengine.fileio.backends.registry_utils
    found.update({('backends', k): v for k, v in backends.backends.items()})
    found.update({('prefixes', k): v for k, v in backends.prefix_to_backends.items()})
    found.update({('signal', n): signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)})
    return found

before = look()
schemes = dict(mmengine.runner.CheckpointLoader._schemes)
import lska_mm
after = look()
changed = [k for k in before if after.get(k) is not before[k] and k[-1] != '_schemes']
mine = {k for k, v in mmengine.runner.CheckpointLoader._schemes.items() if schemes.get(k) is not v}
print('looked at', len(before), 'changed:', *changed)
print('schemes:', *sorted(mine))
for key in (
    ('mmengine.runner.checkpoint', 'load_url'), ('mmengine.config', 'Config', '_get_cfg_path'),
    ('backends', 'local'), ('prefixes', ''),
):
    assert key in before, key
"""


def test_importing_changes_nothing(run):
    """No attribute of another package, no name in a registry, no backend, no signal."""
    looked, schemes = run('python', '-c', UNCHANGED).splitlines()[-2:]
    print(looked, schemes, sep='\n')
    assert int(looked.split()[2]) > 10_000
    assert looked.endswith('changed:')
    assert schemes == 'schemes:  http:// https://'


# --- The shape of the package ----------------------------------------------------

MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in (ROOT / 'lska_mm').rglob('*.py')
    if '.mim' not in path.parts
}


def imports(name):
    """The modules of the package that a module names, and the packages that these lie in."""
    package = name if MODULES[name].name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit('.', node.level - 1)[0]
            module = f'{base}.{node.module}' if node.module else base
            found |= {module, *(f'{module}.{alias.name}' for alias in node.names)}
    found = {module for module in found if module in MODULES}
    around = {module.rpartition('.')[0] for module in found}
    return {m for m in found | around if m not in ('lska_mm', package) or m in found} - {name}


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 30
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ('package', 'allowed'),
    [
        (
            'lska_mm.models',
            {'lska_mm.fast.door', 'lska_mm.weights.names', 'lska_mm.weights.match'},
        ),
        ('lska_mm.fast', set()),
        ('lska_mm.weights', {'lska_mm.models.archs', 'lska_mm.models.lska'}),
    ],
)
def test_packages_know_only_what_is_below_them(package, allowed):
    packages = {'lska_mm', 'lska_mm.models', 'lska_mm.fast', 'lska_mm.weights'}
    for name in MODULES:
        if name.startswith(package):
            others = {m for m in imports(name) if not m.startswith(package)}
            assert others <= allowed | packages, name


def test_importing_twice_registers_once(run):
    run('python', '-c', 'import lska_mm, importlib; importlib.reload(lska_mm)')


def test_installing_pulls_in_nothing(run):
    """Both stacks stay as they are: every requirement belongs to an extra."""
    distribution = metadata.distribution('lska_mm')
    assert distribution.version == lska_mm.__version__
    assert set(distribution.metadata.get_all('Provides-Extra')) == {'onedl', 'openmmlab', 'tests'}
    assert all('extra ==' in requirement for requirement in distribution.requires)
    printed = run('python', '-m', 'pip', 'install', '--dry-run', '--no-build-isolation', '-e', '.')
    assert f'Would install lska_mm-{lska_mm.__version__}' in printed.replace('lska-mm', 'lska_mm')


def test_requirements_agree_with_each_other(run):
    """But for what MMDeploy asks for to serve models."""
    printed = run('bash', '-c', 'python -m pip check || true')
    lines = [line for line in printed.splitlines() if not line.startswith('mmdeploy ')]
    assert lines in ([], ['No broken requirements found.'])


CONFIG = """
_base_ = __import__('lska_mm').config('detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py')
model = dict(backbone=dict(init_cfg=None), train_cfg=dict(rcnn=dict(sampler=dict(num=16))))
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = val_dataloader = test_dataloader = loader
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(96, 64))
train_dataloader.update(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=2, val_interval=3)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


NUCLEI = 'lska_mm/.mim/tools/dataset_converters/nuclei.py'  # its image is in the clone


def test_a_wheel_trains_away_from_the_clone(run, coco, tmp_path):
    """With the configs and tools that it brings, and nothing of the repository."""
    clone, site, user = tmp_path / 'clone', tmp_path / 'site', tmp_path / 'user'
    copy_repository(clone)
    offline = ('--no-deps', '--no-index', '--disable-pip-version-check')
    pip = ('python', '-m', 'pip')
    run(*pip, 'wheel', '.', '--no-build-isolation', *offline, '-w', tmp_path, cwd=clone)
    [wheel] = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ('configs', 'tools'):
        files = [path for path in (clone / folder).rglob('*') if path.is_file()]
        assert len(files) > 10
        paths = {f'lska_mm/.mim/{path.relative_to(clone)}' for path in files}
        assert paths - names == ({NUCLEI} if folder == 'tools' else set())
    assert 'lska_mm/py.typed' in names
    run(*pip, 'install', wheel, *offline, '--target', site)
    shutil.rmtree(clone)

    (user / 'data').mkdir(parents=True)
    (user / 'data/coco').symlink_to(coco)
    (user / 'my_config.py').write_text(CONFIG)
    code = (
        'import runpy, sys, lska_mm; from pathlib import Path; print(lska_mm.__file__); '
        'folder = Path(lska_mm.__file__).parent; sys.argv[1:] = ["my_config.py"]; '
        'runpy.run_path(str(folder / ".mim/tools/train.py"), run_name="__main__")'
    )
    printed = run('python', '-c', code, cwd=user, PYTHONPATH=str(site))
    assert printed.startswith(f'{site}/lska_mm/__init__.py')
    assert 'Epoch(train) [2][1/1]' in printed
    assert (user / 'work_dirs/my_config/epoch_2.pth').is_file()


NO_LINKS = """
import os, runpy, sys
def symlink(*args, **kwargs): raise OSError('no right to make links')
os.symlink, sys.argv = symlink, ['setup.py', '--version']
runpy.run_path('setup.py')
"""


@pytest.mark.parametrize('links', [True, False])
def test_mim_finds_the_clone_s_files(links, run, tmp_path):
    """By links, or by copies that the next installation makes again."""
    copy_repository(tmp_path)
    command = ('setup.py', '--version') if links else ('-c', NO_LINKS)
    mim, gone = tmp_path / 'lska_mm/.mim', tmp_path / 'configs/gone.py'
    gone.touch()
    run('python', *command, cwd=tmp_path)
    assert (mim / 'configs/gone.py').is_file()
    gone.unlink()
    run('python', *command, cwd=tmp_path)
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink() == links
    for name in ('configs', 'tools'):
        found, expected = (
            sorted(str(path.relative_to(folder)) for path in (folder / name).rglob('*.*'))
            for folder in (mim, tmp_path)
        )
        assert found == expected
        assert len(found) > 10


def test_a_clone_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(lska_mm, '__file__', str(tmp_path / '__init__.py'))
    with pytest.raises(FileNotFoundError, match=r'is empty: run `pip install -e \.`'):
        lska_mm.config('detection/retinanet_lska-van-tiny_fpn_1x_coco.py')


@pytest.mark.parametrize(
    'name',
    [
        'classification/lska-van-tiny_4xb128_in1k.py',
        'detection/mask-rcnn_lska-van-tiny_fpn_1x_coco.py',
        'segmentation/lska-van-tiny_upernet_8xb2-160k_ade20k-512x512.py',
    ],
)
def test_a_config_elsewhere_inherits(name, tmp_path):
    text = f"_base_ = __import__('lska_mm').config('{name}')\n"
    (tmp_path / 'my_config.py').write_text(text)
    inherited = Config.fromfile(tmp_path / 'my_config.py')
    cfg = Config.fromfile(ROOT / 'configs' / name)
    assert inherited.to_dict() == cfg.to_dict()


def test_a_base_that_is_not_there(tmp_path):
    nearest = 'detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
    with pytest.raises(
        FileNotFoundError, match=rf'has no config {nearest[:-4]}; the nearest .*{nearest}'
    ):
        lska_mm.config(nearest[:-4])
    (tmp_path / 'my_config.py').write_text(
        f"_base_ = __import__('lska_mm').config('{nearest[1:]}')"
    )
    with pytest.raises(FileNotFoundError, match=nearest):
        Config.fromfile(tmp_path / 'my_config.py')
