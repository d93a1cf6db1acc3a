"""Every tool ends with one line where a file is not what it should be, and writes nothing."""

import runpy
import shutil
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.onnx.utils import export

from conftest import ROOT, published_state
from lska_mm.weights.convert import convert

DIGITS = ROOT / 'demo/lska-van-tiny_digits.py'
NUCLEI = ROOT / 'demo/lska-van-tiny_fpn_nuclei.py'
FIRST = 'patch_embed1.proj.weight'
IMAGE = ROOT / 'demo/nuclei/image.png'


@pytest.fixture(scope='module')
def weights(published_file, tmp_path_factory):
    """Good weights, but not for what they are given to."""
    folder = tmp_path_factory.mktemp('weights')

    def save(name, model):
        torch.save(dict(state_dict=model.state_dict()), folder / name)

    init_default_scope('mmpretrain')
    classifier = MODELS.build(Config.fromfile(DIGITS).model).eval()
    classifier.backbone.switch_to_deploy()
    save('deployed.pth', classifier)
    init_default_scope('mmseg')
    save('segmentor.pth', MODELS.build(Config.fromfile(NUCLEI).model))
    bands = published_state()
    bands[FIRST] = bands[FIRST][:, [0, 1, 2, 0]]
    torch.save(bands, folder / 'bands.pth')
    classifier = nn.Sequential(nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name, graph, bands in (('bands', classifier, 4), ('maps', nn.Conv2d(3, 2, 1), 3)):
        axes = dict(images={0: 'b', 2: 'h', 3: 'w'}, logits={0: 'b', 2: 'h', 3: 'w'})
        if name == 'bands':
            axes['logits'] = {0: 'b'}
        export(graph, (torch.rand(1, bands, 8, 8),), str(folder / f'{name}.onnx'),
               input_names=['images'], output_names=['logits'], dynamic_axes=axes)  # fmt: skip
    convert(str(published_file), folder / 'same.pth', lambda state, meta: state)
    return folder


@pytest.fixture
def files(digits, weights, tmp_path, monkeypatch):
    """A folder to work in, with a folder, a text, and weights of no known network."""
    monkeypatch.chdir(tmp_path)
    for path in weights.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'folder').mkdir()
    for name in ('image.png', 'labels.png', 'class/image.png'):
        (tmp_path / 'texts' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'texts' / name).write_text('not what you think')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits)
    for severity in range(1, 6):
        (tmp_path / f'corrupted/fog/{severity}').mkdir(parents=True)
    (tmp_path / 'text.txt').write_text('not what you think')
    (tmp_path / 'empty').write_text('')
    shutil.copy(DIGITS, tmp_path / 'config.py')
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    return tmp_path


# Arguments, of which CONFIG, CHECKPOINT, IMAGE and FOLDER are right but for one.
REPARAMETERIZE = 'model_converters/reparameterize_model.py'
CONVERT = 'model_converters/convert_checkpoint.py'
TOOLS = {
    'train.py': 'CONFIG --resume CHECKPOINT',
    'test.py': 'CONFIG CHECKPOINT',
    CONVERT: 'CHECKPOINT out/new.pth',
    REPARAMETERIZE: 'CHECKPOINT out/new.pth',
    'deployment/export_onnx.py': 'CONFIG CHECKPOINT out/new.onnx',
    'visualization/attention.py': 'CONFIG CHECKPOINT IMAGE --out out/new.png',
    'visualization/erf.py': '--model CONFIG CHECKPOINT --images FOLDER --out out/new.png',
    'analysis_tools/imagenet_c.py': 'CONFIG CHECKPOINT corrupted --work-dir work',
    'dataset_converters/imagenet_c.py': 'FOLDER --out out --corruptions fog',
    'dataset_converters/nuclei.py': 'FOLDER --out out',
    '../.dev_scripts/shape_bias.py': 'CSV --out out/new.png',
    '../.dev_scripts/seeds.py': 'WORK_DIR',
}
WRONG = {
    'CONFIG': {
        'folder': 'folder" does not exist',
        'missing.py': 'missing.py',
    },
    'CHECKPOINT': {
        'folder': 'folder',  # its own words, or those of Python
        'missing.pth': 'No checkpoint at missing.pth.',
        'text.txt': 'text.txt is damaged, or not a checkpoint',
        'empty': 'empty is damaged, or not a checkpoint',
        'other.pth': 'other.pth',
    },
    'IMAGE': {
        'folder': "Is a directory: 'folder'",
        'missing.png': "No such file or directory: 'missing.png'",
        'text.txt': 'text.txt is not an image',
        'empty': 'empty is not an image',
    },
    'FOLDER': {'missing': 'missing', 'folder': 'folder', 'texts': 'image.png is not an image'},
    'CSV': {
        'folder': 'No CSV file at folder.',
        'missing.csv': 'No CSV file at missing.csv.',
        'text.txt': 'text.txt lacks the columns',
        'empty': 'empty lacks the columns',
        'other.pth': 'other.pth lacks the columns',
    },
    'WORK_DIR': {
        'folder': 'No work dirs in folder;',
        'missing': 'No work dirs in missing;',
        'text.txt': 'No work dirs in text.txt;',
    },
}
CELLS = [
    (tool, kind, wrong)
    for tool, words in TOOLS.items()
    for kind in WRONG
    if kind in words
    for wrong in WRONG[kind]
]
# Arguments of which each is what it should be, but not for this tool.
NOT_DEPLOYED = 'in_channels=3, deploy=True), this backbone is'
WRONG_BACKBONE = 'cannot be loaded into the backbone of the config'
OTHER_TASK = 'tensors are missing (first: head.fc.weight)'
KERNELS = '--kernel-sizes 23 24 --out out'
ERF = '--model CONFIG --images FOLDER --out out/new.png'
ATTENTION = 'CONFIG CHECKPOINT IMAGE --out out/new.png'
QUANTIZE, DEPLOYED = 'deployment/quantize.py', 'deployment/test.py'
REFUSED = [
    ('test.py', 'CONFIG deployed.pth', NOT_DEPLOYED),
    ('test.py', 'CONFIG segmentor.pth', OTHER_TASK),
    (REPARAMETERIZE, 'deployed.pth out/new.pth', 'is deployed already.'),
    ('deployment/export_onnx.py', 'CONFIG deployed.pth out/new.onnx', NOT_DEPLOYED),
    ('deployment/export_onnx.py', 'CONFIG segmentor.pth out/new.onnx', OTHER_TASK),
    ('analysis_tools/imagenet_c.py', 'CONFIG segmentor.pth corrupted --work-dir work', OTHER_TASK),
    (CONVERT, 'SAME same.pth', 'is the file to convert; choose another'),
    (CONVERT, 'SAME same.pth --in-channels 3', 'is the file to convert; choose another'),
    (CONVERT, 'CHECKPOINT out/new.pth --in-channels 0', 'in_channels=0 is less than 1.'),
    (CONVERT, 'bands.pth out/new.pth --in-channels 3', 'only those for 1 or 3 can be resized'),
    (CONVERT, 'CHECKPOINT out/new.pth --kernel-size 24', 'kernel_size=24 cannot be split'),
    (CONVERT, 'CHECKPOINT out/new.pth --separate', 'The kernels are 1-D already'),
    ('analysis_tools/compare_kernels.py', KERNELS, 'kernel_size=24 cannot be split'),
    ('analysis_tools/compare_kernels.py', '--size 32x32 --out out', 'larger than 32x32'),
    ('analysis_tools/compare_kernels.py', '--out text.txt', "File exists: 'text.txt'"),
    ('visualization/erf.py', f'{ERF} --device gpu', "argument --device: 'gpu': "),
    ('visualization/erf.py', f'{ERF} --device cuda:99', "argument --device: 'cuda:99': "),
    ('visualization/attention.py', f'{ATTENTION} --device meta', "argument --device: 'meta': "),
    ('visualization/erf.py', ERF.replace('out/new', 'text.txt/new'), 'text.txt is not a folder'),
    ('visualization/attention.py', 'CONFIG other.pth IMAGE --out out/new.png', WRONG_BACKBONE),
    ('test.py', 'NUCLEI segmentor.pth --out out.pkl', '--out of a segmentor must be a folder'),
    (QUANTIZE, 'CONFIG empty out/new.onnx', 'empty is not an ONNX file.'),
    (QUANTIZE, 'CONFIG text.txt out/new.onnx', 'text.txt is not an ONNX file.'),
    (QUANTIZE, 'CONFIG bands.onnx out/new.onnx', 'bands.onnx does not take the images: '),
    (DEPLOYED, 'CONFIG empty', 'onnxruntime cannot open empty: '),
    (DEPLOYED, 'CONFIG maps.onnx', 'gives logits of [0, 2, 0, 0], the config'),
    (DEPLOYED, 'CONFIG bands.onnx', 'bands.onnx does not take ('),
    (DEPLOYED, 'NUCLEI bands.onnx', 'gives logits of [0, 10], the config'),
    ('../.dev_scripts/benchmark.py', KERNELS, 'kernel_size=24 cannot be split'),
    ('../.dev_scripts/benchmark.py', '--out text.txt', "File exists: 'text.txt'"),
]
MISSING = [
    ('../.dev_scripts/benchmark.py', '--onnx --out out', 'onnxruntime'),
    ('../.dev_scripts/benchmark.py', '--openvino --out out', 'openvino'),
    ('deployment/export_onnx.py', 'CONFIG CHECKPOINT out/new.onnx', 'onnx'),
]


@pytest.fixture
def refuse(files, published_file, monkeypatch, capsys):
    """Run a tool, which must end with one line and without a file; returns the line."""

    def _refuse(tool, words, **changed):
        [same] = files.glob('same-*.pth')
        known = dict(CONFIG=DIGITS, CHECKPOINT=published_file, IMAGE=IMAGE, FOLDER=IMAGE.parent,
                     SAME=same.name, NUCLEI=NUCLEI)  # fmt: skip
        name = tool.rpartition('/')[2]
        arguments = [str({**known, **changed}.get(word, word)) for word in words.split()]
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        monkeypatch.setattr(sys, 'path', [str((ROOT / 'tools' / tool).parent), *sys.path])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        assert exit_.value.code
        code = exit_.value.code  # or the line itself
        printed = capsys.readouterr().err if code in (1, 2) else code
        last = printed.strip().splitlines()[-1]
        assert last.startswith(f'{name}: ')
        assert not list(files.glob('out/*.*'))
        return last

    return _refuse


@pytest.mark.parametrize(('tool', 'kind', 'wrong'), CELLS)
def test_one_line(refuse, tool, kind, wrong):
    last = refuse(tool, TOOLS[tool], **{kind: wrong})
    print(f'| {tool} | {kind} | {wrong} | {last} |')
    assert WRONG[kind][wrong] in last


@pytest.mark.parametrize(('tool', 'words', 'why'), REFUSED)
def test_one_line_for_what_does_not_go_together(refuse, tool, words, why):
    last = refuse(tool, words)
    print(f'| {tool} | {words} | {last} |')
    assert why in last


@pytest.mark.parametrize(('tool', 'words', 'package'), MISSING)
def test_one_line_for_what_is_not_installed(refuse, monkeypatch, tool, words, package):
    monkeypatch.setitem(sys.modules, package, None)
    last = refuse(tool, words)
    print(f'| {tool} | {words} | {last} |')
    assert f'pip install {package}' in last
