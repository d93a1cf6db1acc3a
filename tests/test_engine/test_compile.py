"""Parts of a model compiled for training, by a line in a config."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from test_conformance import BUILD, scalars
from torch import nn

from conftest import small
from lska_mm import CompileHook

HOOK = dict(type='CompileHook', modules=['backbone'], dynamic=True)


@pytest.mark.parametrize(
    ('toolbox', 'backend'),
    [
        ('mmpretrain', 'aot_eager'),
        *(
            pytest.param(toolbox, backend, marks=pytest.mark.soak)
            for toolbox, backend in product(BUILD, ('aot_eager', 'eager'))
            if (toolbox, backend) != ('mmpretrain', 'aot_eager')
        ),
    ],
)
def test_a_compiled_training_is_the_same(toolbox, backend, nuclei, run, tmp_path):
    """Losses, what is validated, averaged weights, and names in checkpoints."""
    data, found = tmp_path if toolbox == 'mmpretrain' else nuclei, []
    for hooks in ([], [dict(**HOOK, backend=backend)]):
        cfg = BUILD[toolbox](data, tmp_path / 'work')
        cfg.model.backbone.drop_path_rate = 0.0  # the compiler would draw other numbers
        cfg.custom_hooks = [dict(type='EMAHook', momentum=0.02), *hooks]
        cfg.dump(tmp_path / 'config.py')
        work_dir = tmp_path / f'work-{len(hooks)}'
        printed = run('python', 'tools/train.py', tmp_path / 'config.py', '--work-dir', work_dir)
        assert ('backbone will be compiled in the first step' in printed) == bool(hooks)
        checkpoint = torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=False)
        names = {key: list(checkpoint[key]) for key in ('state_dict', 'ema_state_dict')}
        found.append((scalars(work_dir), names))
    (records, names), (compiled, names_compiled) = found
    assert names == names_compiled
    difference = max(
        abs(one[key] - other[key]) / max(abs(other[key]), 1)
        for one, other in zip(compiled, records, strict=True) for key in other
    )  # fmt: skip
    print(f'{toolbox}, {backend}: logged numbers differ by up to {difference:.1e}')
    assert difference < 1e-3


class Model(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone, self.head = small(**kwargs), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[1])


@pytest.fixture
def runner():
    """What a hook asks a Runner for."""
    return SimpleNamespace(model=Model(), logger=MMLogger.get_current_instance())


def compiled(model):
    return {name for name, part in model.named_modules() if '_compiled_call_impl' in vars(part)}


def test_validation_copies_and_what_follows_are_not_compiled(runner):
    hook, names = CompileHook(['backbone', 'head'], backend='eager'), {'backbone', 'head'}
    hook.before_train(runner)
    assert compiled(runner.model) == names
    assert compiled(copy.deepcopy(runner.model)) == set()
    hook.before_val(runner)
    assert compiled(runner.model) == set()
    hook.after_val(runner)
    assert compiled(runner.model) == names
    hook.after_train(runner)
    assert compiled(runner.model) == set()


def test_an_unknown_part_is_named(runner):
    with pytest.raises(ValueError, match=r"cannot find 'neck' in Model; .*: backbone, head\.$"):
        CompileHook(['neck']).before_train(runner)


def test_sync_bn_stays_between_compiled_pieces(runner):
    """Without a process group it computes on a CPU, too."""
    runner.model, image = Model(norm_cfg=dict(type='SyncBN')).train(), torch.rand(2, 3, 64, 64)
    twin = copy.deepcopy(runner.model)
    calls = []

    def backend(graph, inputs):
        calls.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    CompileHook(backend=backend).before_train(runner)
    names = compiled(runner.model)
    assert names == {f'backbone.block{i}.{j}.{part}' for i, j in ((1, 0), (1, 1), (2, 0))
                     for part in ('attn', 'mlp')}  # fmt: skip
    torch.testing.assert_close(runner.model(image), twin(image), rtol=1e-4, atol=1e-5)
    assert calls
    assert not any('batch_norm' in target for targets in calls for target in targets)
