import copy
import math

import pytest
import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from conftest import REFERENCE, SMALL, published_state, reference_image, small
from lska_mm import LSKAVAN

# --- Against the published implementation ------------------------------------


@pytest.mark.parametrize(('arch', 'k'), [('tiny', 7), ('tiny', 23), ('small', 35)])
def test_outputs_equal_the_published_ones(arch, k, tmp_path):
    state = published_state(arch, k)
    path = tmp_path / 'published.pth'
    torch.save(dict(state_dict=state), path)
    backbone = LSKAVAN(
        arch, k, out_indices=(0, 1, 2, 3), init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    backbone.init_weights()
    with torch.no_grad():
        stages = backbone.eval()(reference_image())
        logits = functional.linear(
            stages[-1].mean((2, 3)), state['head.weight'], state['head.bias']
        )
    outputs = {f'stage{i}': stage[:, ::8] for i, stage in enumerate(stages, start=1)}
    for name, output in dict(outputs, logits=logits).items():
        expected = torch.as_tensor(REFERENCE[f'{arch}-k{k}-96/{name}'])
        difference = (output - expected).abs().max().item()
        print(f'{arch} k={k} {name}: largest difference {difference:.1e}')
        assert difference <= 1e-5


def test_lka_equals_mmpretrain_van(tmp_path):
    from mmpretrain.models import VAN

    torch.manual_seed(0)
    van = VAN('tiny', out_indices=(0, 1, 2, 3))
    van.eval()  # returns None, unlike ours
    for name, value in van.state_dict().items():
        if 'layer_scale' in name or 'running' in name:
            value.uniform_(0.5, 1)  # let every branch count
    torch.save(van.state_dict(), tmp_path / 'van.pth')
    backbone = LSKAVAN(
        'tiny',
        23,
        'LKA',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'van.pth')),
    )
    backbone.init_weights()
    backbone.eval()
    # mmpretrain's stage norms have torch's default eps.
    for i in range(4):
        getattr(backbone, f'norm{i + 1}').eps = 1e-5
    with torch.no_grad():
        for ours, theirs in zip(backbone(reference_image()), van(reference_image())):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- Arguments ---------------------------------------------------------------


@pytest.mark.parametrize('size', [(65, 97), (33, 32), (64, 71)])
def test_odd_sizes(size):
    outs = small()(torch.rand(2, 3, *size))
    for i, (out, channels) in enumerate(zip(outs, SMALL['embed_dims'])):
        stride = 4 * 2**i
        assert out.shape == (2, channels, *(math.ceil(n / stride) for n in size))
        assert out.is_contiguous()


def test_outputs_follow_out_indices():
    x = torch.rand(1, 3, 64, 64)
    first, second = small().eval()(x)
    backwards = small(out_indices=(1, 0)).eval()(x)
    torch.testing.assert_close(backwards, (second, first), rtol=0, atol=0)
    (last,) = small(out_indices=(-1,)).eval()(x)
    assert torch.equal(last, second)


def test_stages_after_the_last_output_are_not_built():
    backbone = small(out_indices=(0,))
    assert not hasattr(backbone, 'block2')
    backbone(torch.rand(1, 3, 64, 64))[0].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_kernel_size_of_each_stage():
    backbone = small(kernel_size=[7, 23])
    assert backbone.kernel_size == [7, 23]
    for stage, sides in ((1, (3, 3)), (2, (5, 7))):  # local and far, see `split_kernel`
        for block in getattr(backbone, f'block{stage}'):
            gate = block.attn.spatial_gating_unit
            assert gate.conv0h.kernel_size == (1, sides[0])
            assert gate.conv_spatial_v.kernel_size == (sides[1], 1)
    x = torch.rand(1, 3, 64, 64)
    first, second = backbone.eval()(x)
    assert second.shape == (1, 16, 8, 8)
    # The first stage is that of a backbone with its size throughout.
    alone = small(kernel_size=7, out_indices=(0,)).eval()
    alone.load_state_dict(backbone.state_dict())
    assert torch.equal(alone(x)[0], first)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(kernel_size=24), '23 and 29'),
        (dict(kernel_size=[7, 24]), '23 and 29'),
        (dict(kernel_size=[7, 7, 23]), r'\[7, 7, 23\] has 3 values; .* each of the 2 stages'),
        (dict(kernel_size=()), 'has 0 values; .* each of the 2 stages'),
        (dict(arch='huge'), 'valid: tiny, t, b0, small'),
        (dict(arch=dict(embed_dims=[8])), "needs the keys .*'depths'"),
        (dict(arch={**SMALL, 'depths': [1]}), r'embed_dims=\[8, 16\] .* each of the 1 stages'),
        (dict(out_indices=(0, 2)), '2 stages are 0 to 1'),
        (dict(out_indices=(-3,)), '2 stages are 0 to 1'),
        (dict(out_indices=()), 'out_indices'),
        (dict(frozen_stages=2), 'stages 0 to 1'),
        (dict(attention='SE'), "attention='SE' is unknown"),
        (dict(in_channels=0), r'in_channels=\[0\] must be positive'),
        (dict(patch_sizes=(7, 0)), 'patch_sizes=.7, 0. must be positive'),
        (dict(patch_sizes=(7,)), r'patch_sizes=\(7,\) needs 2 values'),
        (dict(arch={**SMALL, 'embed_dims': [8, 0]}), 'embed_dims=.* must be positive'),
        (dict(arch={**SMALL, 'ffn_ratios': [-1, 1]}), 'ffn_ratios=.* must be positive'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


# --- Training ----------------------------------------------------------------


def test_train_and_eval_return_the_module():
    backbone = small()
    assert backbone.train() is backbone
    assert backbone.eval() is backbone
    assert backbone.train(False) is backbone


def test_frozen_stages():
    backbone = small(frozen_stages=0, drop_path_rate=0.5).train()
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD((p for p in backbone.parameters() if p.requires_grad), lr=1)
    sum(out.square().mean() for out in backbone(torch.rand(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {
        name
        for name, value in backbone.state_dict().items()
        if not torch.equal(value, before[name])
    }
    frozen = ('patch_embed1', 'block1', 'norm1')
    assert changed
    assert not any(name.startswith(frozen) for name in changed)
    assert any(name.startswith('patch_embed2.norm.running_mean') for name in changed)
    assert not any(m.training for name in frozen for m in getattr(backbone, name).modules())


def test_norm_eval():
    norms = [m for m in small(norm_eval=True).train().modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 8
    assert not any(m.training for m in norms)
    assert all(m.training for m in small().train().modules())


def test_drop_path_rises_linearly_and_drops_whole_samples():
    backbone = LSKAVAN('tiny', drop_path_rate=0.3)
    rates = [
        block.drop_path.drop_prob for i in range(4) for block in getattr(backbone, f'block{i + 1}')
    ]
    assert rates == pytest.approx([0.3 * i / 12 for i in range(13)])

    block = small(drop_path_rate=0.5).train().block2[0]  # the last one: both rates 0.5
    x = torch.rand(64, 16, 4, 4)
    unchanged = sum(torch.equal(a, b) for a, b in zip(block(x), x))
    assert 4 <= unchanged <= 32  # a quarter in the mean
    assert not any(torch.equal(a, b) for a, b in zip(block.eval()(x), x))


def test_with_cp_changes_nothing_but_memory():
    x = torch.rand(2, 3, 64, 64)
    results, saved = [], []
    for with_cp in (False, True):
        backbone = small(with_cp=with_cp, drop_path_rate=0.2, drop_rate=0.1).train()
        stored = 0

        def pack(tensor):
            nonlocal stored
            stored += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(out.square().mean() for out in backbone(x))
        loss.backward()
        saved.append(stored)
        results.append([loss, *(p.grad for p in backbone.parameters()), *backbone.buffers()])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)
    assert saved[1] < saved[0]


def test_init_follows_fan_out():
    backbone = LSKAVAN('base')
    backbone.init_weights()
    for conv, fan_out in (
        (backbone.patch_embed1.proj, 7 * 7 * 64),
        (backbone.block3[0].mlp.fc1, 1280),
        (backbone.block3[0].mlp.dwconv, 3 * 3),
    ):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert conv.bias.abs().max() == 0
    assert (backbone.block1[0].layer_scale_1 == 1e-2).all()


def test_init_cfg_wins():
    backbone = small(init_cfg=dict(type='Constant', val=0.125, layer='Conv2d'))
    assert (backbone.block1[0].mlp.fc1.weight == 0.125).all()
