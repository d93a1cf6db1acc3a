import collections
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

from conftest import ROOT, published_state, small
from lska_mm import LSKAVAN, load_from_local
from lska_mm.checkpoint import CheckpointError, check_state_dict, convert_state_dict, describe

RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'


def copies_layout(state):
    """Names as in the paper's detection and segmentation folders."""
    renames = [
        ('block', 'blocks'),
        ('.proj.', '.projection.'),
        ('dwconv.dwconv', 'dwconv'),
        ('conv_spatial', 'DW_D_conv'),
        ('conv0', 'DW_conv_'),
    ]
    renamed = {}
    for key, value in state.items():
        if not key.startswith('head'):
            for old, new in renames:
                key = key.replace(old, new)
            renamed[key] = value
    return renamed


def trained_layout(state):
    """Names as in a classifier that was trained with this package."""
    renamed = {}
    for key, value in state.items():
        key = key.replace('dwconv.dwconv', 'dwconv')
        renamed[key.replace('head.', 'head.fc.') if 'head' in key else f'backbone.{key}'] = value
    return renamed


def mmpretrain_van():
    from mmpretrain.models import VAN

    torch.manual_seed(0)
    return {f'backbone.{key}': value for key, value in VAN('tiny').state_dict().items()}


PUBLISHED = published_state()
EMA = {key: value + 1 for key, value in PUBLISHED.items()}
FILES = {
    'published': dict(state_dict=PUBLISHED, state_dict_ema=EMA),
    'published, bare': PUBLISHED,
    'published, parallel': dict(state_dict={f'module.{k}': v for k, v in PUBLISHED.items()}),
    'copies': dict(state_dict=copies_layout(PUBLISHED)),
    'trained': dict(meta=dict(epoch=1), state_dict=trained_layout(PUBLISHED)),
    'mmpretrain VAN': dict(state_dict=mmpretrain_van()),
}
GATE = 'block1.0.attn.spatial_gating_unit.'


def attention_of(name):
    return 'LKA' if 'VAN' in name else 'LSKA'


def expected_backbone(name):
    """The tensors that a backbone must hold afterwards, found by position.

    All layouts list the tensors of a network in the order of its modules, so
    that no knowledge of names is used here.
    """
    state = FILES[name].get('state_dict', FILES[name])
    values = [value for key, value in state.items() if 'head' not in key]
    if 'VAN' in name:  # mmpretrain registers a block's layer scales elsewhere
        return None
    return values


def assert_loaded(backbone, name):
    state = backbone.state_dict()
    expected = expected_backbone(name)
    if expected is None:
        source = FILES[name]['state_dict']
        sums = [sorted(v.double().sum().item() for v in s.values()) for s in (state, source)]
        assert sums[0] == sums[1]
        assert torch.equal(
            state[f'{GATE}conv_spatial.weight'],
            source['backbone.blocks1.0.attn.spatial_gating_unit.DW_D_conv.weight'],
        )
        return
    assert len(state) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state.values(), expected))


@pytest.fixture(params=FILES)
def layout(request, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(FILES[request.param], path)
    return request.param, path


def detector_config(name, checkpoint=None):
    cfg = Config.fromfile(RETINANET)
    cfg.model.backbone.attention = attention_of(name)
    cfg.model.backbone.init_cfg = checkpoint and dict(type='Pretrained', checkpoint=checkpoint)
    cfg.visualizer.vis_backends = []
    return cfg


def build_detector(cfg):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    return MODELS.build(cfg.model)


# --- Every layout, every way in ------------------------------------------------


def test_pretrained_into_a_backbone(layout):
    name, path = layout
    backbone = LSKAVAN(
        'tiny', 23, attention_of(name), init_cfg=dict(type='Pretrained', checkpoint=path)
    )
    backbone.init_weights()
    assert_loaded(backbone, name)


def test_load_state_dict_into_a_backbone(layout):
    name, path = layout
    backbone = LSKAVAN('tiny', 23, attention_of(name))
    content = torch.load(path)
    state = content.get('state_dict', content)
    keys = list(state)
    backbone.load_state_dict(state)
    assert_loaded(backbone, name)
    assert list(state) == keys


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_pretrained_into_a_detector(layout, prefix):
    name, path = layout
    cfg = detector_config(name, path)
    if prefix:
        cfg.model.backbone.init_cfg.prefix = prefix
    detector = build_detector(cfg)
    detector.init_weights()
    assert_loaded(detector.backbone, name)


def test_load_from_into_a_detector(layout):
    name, path = layout
    detector = build_detector(detector_config(name))
    load_checkpoint(detector, path)  # what Runner does with load_from
    assert_loaded(detector.backbone, name)


def test_init_detector(layout):
    from mmdet.apis import init_detector

    name, path = layout
    detector = init_detector(detector_config(name), path, palette='random', device='cpu')
    assert_loaded(detector.backbone, name)


def test_head_is_kept_for_a_classifier():
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='LSKAVAN'),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=1000, in_channels=256),
        )
    )
    classifier.load_state_dict(convert_state_dict(PUBLISHED))
    assert torch.equal(classifier.head.fc.weight, PUBLISHED['head.weight'])


def test_first_stages_load_from_the_whole_network():
    backbone = LSKAVAN('tiny', out_indices=(1,))
    backbone.load_state_dict(PUBLISHED)
    assert torch.equal(backbone.norm2.weight, PUBLISHED['norm2.weight'])


# --- The mapping ---------------------------------------------------------------


@pytest.mark.parametrize('name', FILES)
def test_conversion_is_idempotent_and_loses_nothing(name):
    state = FILES[name].get('state_dict', FILES[name])
    once = convert_state_dict(state)
    assert convert_state_dict(once) == once
    assert [id(v) for v in once.values()] == [id(v) for v in state.values()]
    strangers = {'neck.conv.weight': 1, 'bbox_head.module.x': 2, 'layer1.0.bn1.weight': 3, '': 4}
    assert convert_state_dict(strangers) == strangers


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(CheckpointError, match='The name of a tensor is 5, no text'):
        convert_state_dict({'block1.0.x': 1, 5: 2})


def test_two_layouts_in_one_file_are_refused():
    with pytest.raises(CheckpointError, match=r'block1.0.x and backbone.blocks1.0.x are both'):
        convert_state_dict({'block1.0.x': 1, 'backbone.blocks1.0.x': 2})


@pytest.mark.parametrize('kernel_size', [7, 11, 23, 35, 53, [23, 7]])
@pytest.mark.parametrize('attention', ['LSKA', 'LKA', 'LSKA-trivial', 'LKA-trivial'])
def test_describe_reads_the_arguments_back(kernel_size, attention):
    arch = dict(embed_dims=[8, 16], depths=[1, 2], ffn_ratios=[4, 2])
    backbone = LSKAVAN(arch, kernel_size, attention, in_channels=4, out_indices=(0, 1))
    assert describe(backbone.state_dict()) == dict(
        arch=arch, attention=attention, kernel_size=kernel_size, in_channels=4
    )


def test_kernel_sizes_by_stage_load_into_the_same_or_its_first_stages():
    source = LSKAVAN(kernel_size=[7, 7, 23, 23]).state_dict()
    for target in (
        LSKAVAN(kernel_size=(7, 7, 23, 23)),
        LSKAVAN(kernel_size=[7, 7, 23, 53], out_indices=(2,)),
        LSKAVAN(kernel_size=7, out_indices=(1,)),
    ):
        target.load_state_dict(source)
        assert all(torch.equal(value, source[key]) for key, value in target.state_dict().items())


SYLLABLES = st.sampled_from(
    ['module.', 'backbone.', 'block', 'blocks', 'patch_embed', 'norm', 'head.', '1', '2', '.0',
     '.', '.weight', 'weight', 'projection.', '.projection.', '.dwconv', '.DW_conv', '.DW_conv_',
     'h', '.DW_D_conv', '_h', 'attn.', 'fc.', '\n']
)  # fmt: skip
STEMS = st.sampled_from(['patch_embed1', 'block2.0', 'blocks1.0.attn', 'norm3', 'head', 'neck'])
PARTS = st.lists(SYLLABLES, max_size=4).map(''.join)
KEYS = st.one_of(st.text(), PARTS, st.tuples(PARTS, STEMS, PARTS).map(''.join))
SHORT = settings(max_examples=300, deadline=None, derandomize=True, database=None)
LONG = settings(max_examples=10_000, deadline=None, database=None)


@pytest.mark.parametrize('how', [SHORT, pytest.param(LONG, marks=pytest.mark.soak)])
def test_any_name_is_converted_once_and_no_tensor_is_lost(how):
    counts = collections.Counter()

    @how
    @given(st.lists(KEYS, unique=True, max_size=6))
    def check(keys):
        state = {key: object() for key in keys}
        try:
            converted = convert_state_dict(state)
        except CheckpointError as error:
            counts['refused'] += 1
            assert 'are both' in str(error)  # noqa: PT017
            return
        counts['converted'] += 1
        counts['renamed'] += list(converted) != keys
        assert list(converted.values()) == list(state.values())
        assert convert_state_dict(converted) == converted

    check()
    print(f'state dicts of random names: {dict(counts)}')
    assert min(counts['converted'], counts['renamed']) > 20


# --- Weights of something else -------------------------------------------------


@pytest.mark.parametrize(
    ('kwargs', 'found', 'expected'),
    [
        (dict(kernel_size=35), "arch='tiny', attention='LSKA', kernel_size=23", 'kernel_size=35'),
        (dict(kernel_size=[23, 23, 23, 35]), 'kernel_size=23', 'kernel_size=[23, 23, 23, 35]'),
        (dict(arch='small'), "arch='tiny'", "arch='small'"),
        (dict(attention='LKA'), "attention='LSKA'", "attention='LKA'"),
        (dict(in_channels=4), 'in_channels=3', 'in_channels=4'),
    ],
)
def test_another_network_is_refused(published_file, kwargs, found, expected):
    backbone = LSKAVAN(**kwargs, init_cfg=dict(type='Pretrained', checkpoint=str(published_file)))
    with pytest.raises(CheckpointError) as error:
        backbone.init_weights()
    print(error.value)
    assert 'or the checkpoint (resize_kernel.py and van2lska.py in' in str(error.value)
    weights, _, ours = str(error.value).partition('this backbone is')
    assert found in weights
    assert expected in ours


@pytest.mark.parametrize(
    'state',
    [
        {},
        {'conv1.weight': torch.zeros(1), 'layer1.0.bn1.weight': torch.zeros(1)},
        {'backbone.patch_embed1.proj.weight': torch.zeros(32, 3, 7, 7)},
    ],
)
def test_no_usable_key_is_refused(state, tmp_path):
    path = str(tmp_path / 'other.pth')
    torch.save(dict(state_dict=state), path)
    match = rf'No LSKA-VAN among the {len(state)} tensors .*kernel_size=23.*Nothing was loaded'
    with pytest.raises(CheckpointError, match=match):
        LSKAVAN(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    detector = build_detector(detector_config('LSKA'))
    with pytest.raises(CheckpointError, match='No LSKA-VAN among the'):
        load_checkpoint(detector, path)


def test_one_missing_tensor_is_named():
    state = {k: v for k, v in PUBLISHED.items() if k != 'norm3.bias'}
    with pytest.raises(CheckpointError, match=r'1 tensors are missing \(first: norm3.bias\)'):
        LSKAVAN().load_state_dict(state, strict=False)


def test_a_damaged_gate_is_named():
    state = {k: v for k, v in PUBLISHED.items() if not k.startswith('block3.0.attn.spatial')}
    with pytest.raises(CheckpointError, match=r'kernel_size=23.*10 tensors .*first: block3.0'):
        LSKAVAN().load_state_dict(state)


def test_a_deeper_network_is_refused():
    """All tensors of small are in base, under the same names and shapes."""
    base = LSKAVAN('base').state_dict()
    with pytest.raises(CheckpointError, match=r"arch='base'.*arch='small'.*have no place"):
        LSKAVAN('small').load_state_dict(base, strict=False)


def test_a_refused_file_leaves_the_backbone_as_it_was(published_file):
    backbone = LSKAVAN(kernel_size=7)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_checkpoint(backbone, str(published_file))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


# --- Numbers that are none, or of another kind ---------------------------------


@pytest.mark.parametrize(
    'kind', [torch.float16, torch.bfloat16, torch.float64], ids=lambda kind: str(kind)[6:]
)
def test_other_precisions_are_welcome(kind):
    backbone = small()
    state = {k: v.to(kind) for k, v in backbone.state_dict().items()}  # counts of batches, too
    backbone.load_state_dict(state)
    assert all(
        (v.dtype, v.tolist()) == (torch.float32, state[k].float().tolist())
        for k, v in backbone.named_parameters()
    )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda x: x.long(),
            r'2 .*another kind of numbers \(first: norm1.weight, found .*int64, ex',
        ),
        (lambda x: x > 0, 'as this backbone is, but 2 .*found torch.bool, expected torch.float32'),
        (lambda x: x + 0j, 'found torch.complex64, expected torch.float32'),
        (
            lambda x: x / 0,
            r'2 of \d+ tensors hold NaN or inf.*first: norm1.weight\), as after a tr',
        ),
        (lambda x: x.double() + 1e300, '2 of .* tensors hold NaN or infinity'),
        (lambda x: x.tolist(), r'2 of them are no tensors \(first: norm1.weight\)'),
    ],
)
def test_numbers_that_are_none(change, message, tmp_path):
    backbone = small()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = {f'backbone.{k}': change(v) if k[:5] == 'norm1' else v for k, v in before.items()}
    torch.save(dict(state_dict=state), tmp_path / 'wrong.pth')
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(backbone, str(tmp_path / 'wrong.pth'), revise_keys=[(r'^backbone\.', '')])
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_count_may_not_be_a_fraction():
    state = {k: v + 0.5 if 'num_batches' in k else v for k, v in small().state_dict().items()}
    with pytest.raises(CheckpointError, match=r'found torch\.float32, expected torch\.int64'):
        small().load_state_dict(state)


# --- Whole models ---------------------------------------------------------------


@pytest.fixture
def model():
    """A backbone and a head, in a wrapper as DDP is one."""
    parts = torch.nn.ModuleDict(dict(backbone=small(), head=torch.nn.Linear(8, 2)))
    return torch.nn.ModuleDict(dict(module=parts))


def test_the_tensors_of_a_model_may_be_loaded_into_it(model):
    state = {
        key.replace('module.backbone', 'module.module'): value.half()  # a published layout
        for key, value in model.state_dict().items()
    }
    check_state_dict(model, state, 'w.pth')
    check_state_dict(model, {**state, 'neck.weight': torch.ones(1)}, 'w.pth', allow_extra=True)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(neck=torch.ones(1)), r'1 tensors have no place \(first: neck\)'),
        ({'head.bias': torch.ones(3)}, r'first: head.fc.bias, found \(3,\), expected \(2,\)'),
        ({'head.bias': torch.ones(2).long()}, 'found torch.int64, expected torch.float32'),
        ({'head.bias': torch.ones(2) / 0}, r'hold NaN or infinity \(first: head.fc.bias\)'),
        ({'head.bias': [1, 2]}, r'1 of them are no tensors \(first: head.fc.bias\)'),
    ],
)
def test_other_tensors_may_not(model, change, message):
    with pytest.raises(
        CheckpointError,
        match=rf'^w.pth cannot be loaded into the ModuleDict of the config: .*{message}'
        r'.*The file holds a classifier \(LSKAVAN\(arch',
    ):
        check_state_dict(model, {**model['module'].state_dict(), **change}, 'w.pth')


def test_names_that_are_none_are_refused_with_the_file(model):
    with pytest.raises(CheckpointError, match=r'^w.pth: The name of a tensor is 5, no text'):
        check_state_dict(model, {5: torch.ones(1)}, 'w.pth', allow_extra=True)


# --- Files ---------------------------------------------------------------------


def test_missing_file_says_what_to_change():
    with pytest.raises(FileNotFoundError, match=r'nowhere.pth.*init_cfg.checkpoint.*LSKA_PRETRA'):
        load_from_local('nowhere.pth')


@pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99])
def test_truncated_file(published_file, tmp_path, share):
    whole = published_file.read_bytes()
    path = tmp_path / 'truncated.pth'
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r'truncated.pth is damaged'):
        LSKAVAN(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@pytest.mark.parametrize('content', [b'<!DOCTYPE html>', b'\x80\x02]q\x00.', b'0' * 1000])
def test_file_of_something_else(tmp_path, content):
    path = tmp_path / 'download.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'download\.pth is damaged, or not a file'):
        load_from_local(str(path))


class _Bomb:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped, monkeypatch):
    from mmdet.apis import init_detector

    path, target = str(tmp_path / 'bomb.pth'), tmp_path / 'ran'
    torch.save(
        dict(state_dict=PUBLISHED, args=_Bomb(target)), path, _use_new_zipfile_serialization=zipped
    )
    for load in (
        lambda: LSKAVAN(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights(),
        lambda: load_checkpoint(LSKAVAN(), path),
        lambda: init_detector(detector_config('LSKA'), path, device='cpu'),
    ):
        with pytest.raises(CheckpointError, match=r'posix.mkdir.*NO_WEIGHTS_ONLY_LOAD=1'):
            load()
        assert not target.exists()

    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    load_checkpoint(LSKAVAN(), path)
    assert target.exists()


def test_torch_can_be_told_to_read_weights_only(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    torch.save(dict(state_dict=PUBLISHED), tmp_path / 'tensors.pth')
    torch.save(dict(state_dict=PUBLISHED, args=_Bomb(tmp_path / 'ran')), tmp_path / 'bomb.pth')
    load_checkpoint(LSKAVAN(), str(tmp_path / 'tensors.pth'))
    with pytest.raises(CheckpointError, match=r'bomb\.pth was refused'):
        load_checkpoint(LSKAVAN(), str(tmp_path / 'bomb.pth'))
    assert not (tmp_path / 'ran').exists()


def test_getattr_reaches_nothing_but_the_logs(tmp_path):
    class Reach:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save(Reach(), tmp_path / 'reach.pth')
    with pytest.raises(CheckpointError, match='getattr'):
        load_from_local(str(tmp_path / 'reach.pth'))


def test_what_training_writes_can_be_read(tmp_path):
    import numpy as np

    # The log of a long training is most of what is pickled.
    buffer = HistoryBuffer(np.random.default_rng(0).random(20_000), np.ones(20_000))
    content = dict(
        message_hub=dict(log_scalars={'loss': buffer}, runtime_info={'x': np.float64(0.5)}),
        param_schedulers=[dict(milestones=collections.Counter([8, 11]))],
        state_dict=collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2).half())),
        array=np.arange(3),
        size=torch.Size([1, 2]),
        dtype=torch.bfloat16,
    )
    torch.save(content, tmp_path / 'epoch_1.pth')
    read = load_from_local(str(tmp_path / 'epoch_1.pth'))
    assert pickle.dumps(read['param_schedulers']) == pickle.dumps(content['param_schedulers'])
    assert read['message_hub']['log_scalars']['loss'].mean() == buffer.mean()
    assert torch.equal(read['state_dict']['w'], content['state_dict']['w'])
    assert read['array'].tolist() == [0, 1, 2]
    assert (read['size'], read['dtype']) == (content['size'], content['dtype'])
