"""Every tool ends with one line where a file is not what it should be, and writes nothing."""

import re
import shutil
import sys

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.onnx.utils import export

from conftest import ROOT, Bomb, published_state
from lska_mm.weights.convert import convert

DIGITS = ROOT / 'demo/lska-van-tiny_digits.py'
NUCLEI = ROOT / 'demo/lska-van-tiny_fpn_nuclei.py'
FIRST = 'patch_embed1.proj.weight'
IMAGE = ROOT / 'demo/nuclei/image.png'
GATED = """
default_scope = 'mmdet'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
plugin = dict(cfg=dict(type='LSKA', kernel_size=11), position='after_conv3')
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=50, stem_channels=8, base_channels=8, plugins=[plugin]))
"""


@pytest.fixture(scope='module')
def weights(published_file, tmp_path_factory):
    """Weights that are damaged, or not for what they are given to."""
    folder = tmp_path_factory.mktemp('weights')

    def save(name, model):
        torch.save(dict(state_dict=model.state_dict()), folder / name)

    init_default_scope('mmpretrain')
    classifier = MODELS.build(Config.fromfile(DIGITS).model).eval()
    classifier.backbone.switch_to_deploy()
    save('deployed.pth', classifier)
    init_default_scope('mmseg')
    save('segmentor.pth', MODELS.build(Config.fromfile(NUCLEI).model))
    (folder / 'gated.py').write_text(GATED)
    gated = MODELS.build(Config.fromfile(folder / 'gated.py').model.backbone)
    save('gated.pth', nn.ModuleDict(dict(backbone=gated)))
    for name, key, change in (
        ('bands.pth', FIRST, lambda x: x[:, [0, 1, 2, 0]]),
        ('nan.pth', 'norm1.bias', lambda x: x / 0),
        ('shape.pth', 'norm1.bias', lambda x: x[1:]),
    ):
        state = published_state()
        torch.save({**state, key: change(state[key])}, folder / name)
    torch.save(dict(state_dict={}, args=Bomb(folder / 'ran')), folder / 'bomb.pth')
    torch.load(folder / 'bomb.pth', weights_only=False)
    (folder / 'ran').rmdir()  # it works
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
    for name, side in (('image.png', 8), ('labels.png', 9)):
        mmcv.imwrite(np.zeros((8, side), np.uint8), str(tmp_path / 'unequal' / name))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits)
    for severity in range(1, 6):
        (tmp_path / f'corrupted/fog/{severity}').mkdir(parents=True)
        if severity != 3:
            (tmp_path / f'lacking/fog/{severity}').mkdir(parents=True)
    (tmp_path / 'header.csv').write_text('subj,object_response,category,imagename\n')
    (tmp_path / 'text.txt').write_text('not what you think')
    (tmp_path / 'empty').write_text('')
    shutil.copy(DIGITS, tmp_path / 'config.py')
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    return tmp_path


CONVERT = 'model_converters/convert_checkpoint.py'
REPARAMETERIZE = 'model_converters/reparameterize_model.py'
CORRUPT, IMAGENET_C = 'dataset_converters/imagenet_c.py', 'analysis_tools/imagenet_c.py'
COMPARE, NUCLEI_TOOL = 'analysis_tools/compare_kernels.py', 'dataset_converters/nuclei.py'
ERF, ATTENTION = 'visualization/erf.py', 'visualization/attention.py'
EXPORT, QUANTIZE = 'deployment/export_onnx.py', 'deployment/quantize.py'
SOAK, BENCHMARK = '../.dev_scripts/soak.py', '../.dev_scripts/benchmark.py'
SHAPE_BIAS = '../.dev_scripts/shape_bias.py'
# Arguments, of which CONFIG, CHECKPOINT, IMAGE and FOLDER are right but for one.
TOOLS = {
    'train.py': 'CONFIG --resume CHECKPOINT',
    'test.py': 'CONFIG CHECKPOINT',
    CONVERT: 'CHECKPOINT out/new.pth',
    REPARAMETERIZE: 'CHECKPOINT out/new.pth',
    EXPORT: 'CONFIG CHECKPOINT out/new.onnx',
    ATTENTION: 'CONFIG CHECKPOINT IMAGE --out out/new.png',
    ERF: '--model CONFIG CHECKPOINT --images FOLDER --out out/new.png',
    IMAGENET_C: 'CONFIG CHECKPOINT corrupted --work-dir work',
    CORRUPT: 'FOLDER --out out --corruptions fog',
    NUCLEI_TOOL: 'FOLDER --out out',
    SHAPE_BIAS: 'CSV --out out/new.png',
    '../.dev_scripts/seeds.py': 'WORK_DIR',
}
WRONG = {
    'CONFIG': {'folder': 'folder" does not exist', 'missing.py': 'missing.py'},
    'CHECKPOINT': {
        'folder': 'folder',  # its own words, or those of Python
        'missing.pth': 'No checkpoint at missing.pth.',
        'text.txt': 'text.txt is damaged, or not a checkpoint',
        'empty': 'empty is damaged, or not a checkpoint',
        'other.pth': 'other.pth',
        'bomb.pth': 'bomb.pth was refused: it holds posix.mkdir, and loading that could run code',
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
DRAW = '--model CONFIG --images FOLDER --out out/new.png'
DRAW_TRAINED = DRAW.replace('CONFIG', 'CONFIG CHECKPOINT')
DRAW_GATED = DRAW.replace('CONFIG', 'gated.py --kernel-sizes 7')
GATES = 'CONFIG CHECKPOINT IMAGE --out out/new.png'
GATES_OF_RESNET = GATES.replace('CONFIG CHECKPOINT', 'gated.py gated.pth')
REFUSED = [
    ('test.py', 'CONFIG deployed.pth', NOT_DEPLOYED),
    ('test.py', 'CONFIG segmentor.pth', OTHER_TASK),
    ('test.py', 'CONFIG CHECKPOINT --out-item metrics', '--out-item says what --out dumps'),
    (REPARAMETERIZE, 'deployed.pth out/new.pth', 'is deployed already.'),
    (REPARAMETERIZE, 'gated.pth out/new.pth', 'holds no LSKA-VAN'),
    (REPARAMETERIZE, 'nan.pth out/new.pth', 'tensors hold NaN'),
    (REPARAMETERIZE, 'shape.pth out/new.pth', 'tensors differ in shape'),
    (EXPORT, 'CONFIG deployed.pth out/new.onnx', NOT_DEPLOYED),
    (EXPORT, 'CONFIG segmentor.pth out/new.onnx', OTHER_TASK),
    (IMAGENET_C, 'CONFIG segmentor.pth corrupted --work-dir work', OTHER_TASK),
    (IMAGENET_C, 'CONFIG CHECKPOINT folder --work-dir work', 'No corruption in folder'),
    (IMAGENET_C, 'CONFIG CHECKPOINT lacking --work-dir work', 'lacks fog/3.'),
    (CORRUPT, 'FOLDER --out out --corruptions rain', 'Unknown corruptions: rain; known'),
    (CORRUPT, 'FOLDER --out out --size 16x16', '--size must be a square of 32x32 or more'),
    (CORRUPT, 'FOLDER --out out --size 64x48', '--size must be a square of 32x32 or more'),
    (NUCLEI_TOOL, 'unequal --out out', 'image.png is (8, 8), labels.png (8, 9)'),
    (CONVERT, 'SAME same.pth', 'is the file to convert; choose another'),
    (CONVERT, 'SAME same.pth --in-channels 3', 'is the file to convert; choose another'),
    (CONVERT, 'CHECKPOINT out/new.pth --in-channels 0', 'in_channels=0 is less than 1.'),
    (CONVERT, 'bands.pth out/new.pth --in-channels 3', 'only those for 1 or 3 can be resized'),
    (CONVERT, 'CHECKPOINT out/new.pth --kernel-size 24', 'kernel_size=24 cannot be split'),
    (CONVERT, 'CHECKPOINT out/new.pth --separate', 'The kernels are 1-D already'),
    (COMPARE, KERNELS, 'kernel_size=24 cannot be split'),
    (COMPARE, '--size 32x32 --out out', 'larger than 32x32'),
    (COMPARE, '--out text.txt', "File exists: 'text.txt'"),
    (ERF, DRAW.replace('out/new.png', 'folder'), 'folder does not end in .png'),
    (ERF, f'{DRAW} --size 64', "'64' is not HEIGHTxWIDTH"),
    (ERF, f'{DRAW} --size 48x48', 'The last map of 48 pixels has 2 points'),
    (ERF, DRAW_GATED, '--kernel-sizes is for LSKAVAN, gated.py has none.'),
    (ERF, f'{DRAW_TRAINED} --kernel-sizes 7', '--kernel-sizes takes one --model, without a check'),
    (ERF, f'{DRAW_TRAINED} --cfg-options model.backbone.kernel_size=7', 'kernel_size=23'),
    (ERF, f'{DRAW} --device gpu', "argument --device: 'gpu': "),
    (ERF, f'{DRAW} --device cuda:99', "argument --device: 'cuda:99': "),
    (ATTENTION, f'{GATES} --device meta', "argument --device: 'meta': "),
    (ERF, DRAW.replace('out/new', 'text.txt/new'), 'text.txt is not a folder'),
    (ATTENTION, 'CONFIG other.pth IMAGE --out out/new.png', WRONG_BACKBONE),
    (ATTENTION, GATES_OF_RESNET, 'The backbone is ResNet; expected LSKAVAN.'),
    ('test.py', 'NUCLEI segmentor.pth --out out.pkl', '--out of a segmentor must be a folder'),
    (QUANTIZE, 'CONFIG empty out/new.onnx', 'empty is not an ONNX file.'),
    (QUANTIZE, 'CONFIG text.txt out/new.onnx', 'text.txt is not an ONNX file.'),
    (QUANTIZE, 'CONFIG bands.onnx out/new.onnx', 'bands.onnx does not take the images: '),
    ('deployment/test.py', 'CONFIG empty', 'onnxruntime cannot open empty: '),
    ('deployment/test.py', 'CONFIG maps.onnx', 'gives logits of [0, 2, 0, 0], the config'),
    ('deployment/test.py', 'CONFIG bands.onnx', 'bands.onnx does not take ('),
    ('deployment/test.py', 'NUCLEI bands.onnx', 'gives logits of [0, 10], the config'),
    (BENCHMARK, KERNELS, 'kernel_size=24 cannot be split'),
    (BENCHMARK, '--out text.txt', "File exists: 'text.txt'"),
    (BENCHMARK, '--onnx --train --out out', '--onnx and --openvino are for inference on a CPU'),
    (BENCHMARK, '--precisions int8 --out out', 'give --onnx or --openvino'),
    (SOAK, 'CONFIG --minutes nan --out out', '--minutes: nan is not above 0'),
    (SOAK, 'CONFIG --runners 0 --out out', '--runners must be 1 or more'),
    (SOAK, 'missing.py --out out', "No such file or directory: 'missing.py'"),
    (SHAPE_BIAS, 'header.csv --out out/new.png', 'holds no image whose shape'),
]
MISSING = [
    (BENCHMARK, '--onnx --out out', 'onnxruntime'),
    (BENCHMARK, '--openvino --out out', 'openvino'),
    (EXPORT, 'CONFIG CHECKPOINT out/new.onnx', 'onnx'),
]


@pytest.fixture
def refuse(files, weights, published_file, main):
    """Run a tool, which must end with one line and without a file; returns the line."""

    def _refuse(tool, words, **changed):
        [same] = files.glob('same-*.pth')
        known = dict(CONFIG=DIGITS, CHECKPOINT=published_file, IMAGE=IMAGE, FOLDER=IMAGE.parent,
                     SAME=same.name, NUCLEI=NUCLEI)  # fmt: skip
        arguments = [{**known, **changed}.get(word, word) for word in words.split()]
        code, printed = main(f'tools/{tool}', *arguments)
        assert code
        last = printed.strip().splitlines()[-1]
        assert last.startswith(f'{tool.rpartition("/")[2]}: ')
        assert not list(files.glob('out/*.*'))
        assert not (weights / 'ran').exists()
        return last

    return _refuse


def test_every_tool_that_reads_a_checkpoint_is_here():
    argument = re.compile(
        r"add_argument\(\s*'(checkpoint'|--model'|--resume')|= parse_args\(|converter_parser\("
    )
    paths = [path for path in ROOT.glob('tools/**/*.py') if argument.search(path.read_text())]
    tools = [tool for tool, words in TOOLS.items() if 'CHECKPOINT' in words]
    assert sorted(str(path.relative_to(ROOT / 'tools')) for path in paths) == sorted(tools)


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
