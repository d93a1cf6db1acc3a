"""What tensors are, and whether they are a model's."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from torch import nn

from conftest import GATE, ROOT, SMALL, published_state, small
from lska_mm import LSKAVAN
from lska_mm.weights.match import describe, load_whole
from lska_mm.weights.names import CheckpointError
from trainings import build_model

RETINANET = ROOT / 'configs/detection/retinanet_lska-van-tiny_fpn_1x_coco.py'
PUBLISHED = published_state()


@pytest.mark.parametrize('kernel_size', [7, 11, 23, 35, 53, [23, 7]])
@pytest.mark.parametrize('attention', ['LSKA', 'LKA', 'LSKA-trivial', 'LKA-trivial'])
def test_describe_reads_the_arguments_back(kernel_size, attention):
    arch = dict(embed_dims=[8, 16], depths=[1, 2], ffn_ratios=[4, 2])
    backbone = LSKAVAN(arch, kernel_size, attention, in_channels=4, out_indices=(0, 1))
    assert describe(backbone.state_dict()) == dict(
        arch=arch, attention=attention, kernel_size=kernel_size, in_channels=4
    )


@pytest.mark.parametrize('width', [1, 8, 49, 320])
def test_describe_has_the_ratio_that_builds_the_same_mlp(width):
    state = {key: value for key, value in small().state_dict().items() if key.startswith(GATE)}
    with torch.device('meta'):
        state['patch_embed1.proj.weight'] = torch.empty(width, 3, 7, 7)
        for hidden in range(1, 5 * width):
            state['block1.0.mlp.fc1.weight'] = torch.empty(hidden, width, 1, 1)
            ratio = describe(state)['arch']['ffn_ratios'][0]
            assert int(width * ratio) == hidden
            assert isinstance(ratio, int) == (hidden % width == 0)


def test_kernel_sizes_by_stage_load_into_the_same_or_its_first_stages():
    source = LSKAVAN(kernel_size=[7, 7, 23, 23]).state_dict()
    for target in (
        LSKAVAN(kernel_size=(7, 7, 23, 23)),
        LSKAVAN(kernel_size=[7, 7, 23, 53], out_indices=(2,)),
        LSKAVAN(kernel_size=7, out_indices=(1,)),
    ):
        target.load_state_dict(source)
        assert all(torch.equal(value, source[key]) for key, value in target.state_dict().items())


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
    backbone = LSKAVAN(**kwargs)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(backbone, str(published_file))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    tools = 'or the checkpoint (with a tool in tools/model_converters)'
    assert (tools in str(error.value)) == ('arch' not in kwargs)
    assert str(error.value).startswith(f'{published_file}: The weights are LSKAVAN')
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
    match = rf'no LSKA-VAN \({len(state)} tensors, .*kernel_size=23.*Nothing was loaded'
    with pytest.raises(CheckpointError, match=match):
        LSKAVAN(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    detector = build_model(Config.fromfile(RETINANET))
    with pytest.raises(CheckpointError, match='no LSKA-VAN'):
        load_checkpoint(detector, path)


@pytest.mark.parametrize(
    ('left_out', 'message'),
    [
        ('norm3.bias', r'1 tensors are missing \(first: norm3.bias\)'),
        ('block3.0.attn.spatial', r'kernel_size=23.*10 tensors .*first: block3.0'),
    ],
)
def test_missing_tensors_are_named(left_out, message):
    state = {k: v for k, v in PUBLISHED.items() if not k.startswith(left_out)}
    with pytest.raises(CheckpointError, match=message):
        LSKAVAN().load_state_dict(state)


def test_a_part_may_be_loaded_when_it_is_asked_for():
    """By itself and as a part of a model, PyTorch says what is missing."""
    part = {'norm3.bias': torch.full((160,), 7.0)}
    backbone = LSKAVAN()
    missing, unexpected = backbone.load_state_dict(part, strict=False)
    names = {key for key in backbone.state_dict() if 'num_batches_tracked' not in key}
    assert (set(missing), unexpected) == (names - part.keys(), [])
    assert torch.equal(backbone.norm3.bias, part['norm3.bias'])
    model = nn.ModuleDict(dict(backbone2=LSKAVAN(), head=nn.Linear(2, 2)))
    missing, _ = model.load_state_dict({'head.bias': torch.ones(2)}, strict=False)
    assert 'backbone2.norm3.bias' in missing
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "backbone2'):
        model.load_state_dict({'head.bias': torch.ones(2)})


@pytest.mark.parametrize('name', ['pool.weight', 'block_1.weight'])
def test_unknown_tensors_are_unexpected(name):
    """As in PyTorch, in a backbone and in a model; a head, of another part, is not."""
    backbone = small()
    state = {**backbone.state_dict(), 'head.weight': torch.ones(2), name: torch.ones(2)}
    model = nn.ModuleDict(dict(backbone=small(), head=nn.Linear(2, 1)))
    whole = {**model.state_dict(), f'backbone.{name}': torch.ones(2)}
    for module, tensors, key in ((backbone, state, name), (model, whole, f'backbone.{name}')):
        with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{key}"'):
            module.load_state_dict(tensors)
        assert module.load_state_dict(tensors, strict=False).unexpected_keys == [key]
    backbone.load_state_dict({**model.state_dict(), 'neck.weight': torch.ones(2)})


def test_a_backbone_under_another_name_is_named(published_file):
    model = nn.ModuleDict(dict(target_net=nn.Sequential(LSKAVAN())))
    with pytest.raises(CheckpointError, match=rf'{published_file}, target_net\.0: .*no LSKA-VAN'):
        load_checkpoint(model, str(published_file))
    torch.save(model.state_dict(), published_file.with_name('byol.pth'))
    load_checkpoint(model, str(published_file.with_name('byol.pth')))


def test_a_deeper_network_is_refused():
    """All tensors of small are in base, under the same names and shapes."""
    base = LSKAVAN('base').state_dict()
    with pytest.raises(CheckpointError, match=r"arch='base'.*arch='small'.*are unexpected"):
        LSKAVAN('small').load_state_dict(base)


@pytest.mark.parametrize('prefix', ['module.', 'backbone.', 'student.encoder.'])
def test_pretrained_takes_the_tensors_behind_a_prefix(prefix, tmp_path):
    """As MMEngine does for a ResNet; of a wrong one it says what is there."""
    wanted, path = small().state_dict(), str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict={f'{prefix}{key}': v for key, v in wanted.items()}), path)

    def load(prefix):
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
        backbone = LSKAVAN(SMALL, 11, out_indices=(0, 1), init_cfg=init_cfg)
        backbone.init_weights()
        return backbone.state_dict()

    assert all(torch.equal(value, wanted[key]) for key, value in load(prefix).items())
    with pytest.raises((CheckpointError, AssertionError), match=r'teacher|no LSKA-VAN'):
        load('teacher.')


# --- Numbers -------------------------------------------------------------------


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
        (lambda x: x / 0, r'2 tensors hold NaN or infinity, as after a tr.*first: norm1.weight'),
        (lambda x: x.double() + 1e300, '2 tensors hold NaN or infinity'),
        (lambda x: x.tolist(), r'2 tensors are not of type Tensor \(first: norm1.weight\)'),
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


# --- Whole models --------------------------------------------------------------


@pytest.fixture
def model():
    """A backbone and a head, in a wrapper as DDP is one."""
    parts = nn.ModuleDict(dict(backbone=small(), head=nn.Linear(8, 2)))
    return nn.ModuleDict(dict(module=parts))


def random_tensors(model):
    """What the model in the wrapper could hold."""
    return {k: torch.rand(v.shape).to(v) for k, v in model['module'].state_dict().items()}


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.module.'])
def test_load_whole(model, prefix):
    state = random_tensors(model)
    extra = {'neck.weight': torch.ones(1), 5: torch.ones(1)}
    load_whole(model, {**{prefix + key: v for key, v in state.items()}, **extra}, 'w.pth')
    assert all(torch.equal(v, state[k]) for k, v in model['module'].state_dict().items())
    load_whole(model['module'], {key: v.double() for key, v in state.items()}, 'w.pth')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'head.bias': None}, r'1 tensors are missing \(first: head.bias\)'),
        ({'head.bias': None, 5: torch.ones(2)}, r'1 tensors are missing \(first: head.bias\)'),
        ({'head.bias': torch.ones(3)}, r'size mismatch for head.bias.*\[3\].*\[2\]'),
        ({'head.bias': [1, 2]}, 'head.bias.*expected torch.Tensor.*received'),
        ({'backbone.norm2.bias': None}, r'1 tensors are missing \(first: norm2.bias\)'),
        ({'backbone.norm2.bias': torch.ones(3)}, r'norm2.bias, found \(3,\), expected \(16,\)'),
        ({'backbone.norm2.bias': [1, 2]}, r'are not of type Tensor \(first: norm2.bias\)'),
    ],
)
def test_load_whole_leaves_nothing_random(model, change, message):
    state = {**random_tensors(model), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(
        CheckpointError,
        match=rf'^w.pth cannot be loaded into the ModuleDict of the config: .*{message}'
        r'.*The file holds [^\n]*head\.$',
    ):
        load_whole(model, state, 'w.pth')
