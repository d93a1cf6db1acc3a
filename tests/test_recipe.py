"""The ImageNet recipe against timm, by which the authors trained."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from timm.optim.optim_factory import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from conftest import ROOT

CONFIG = ROOT / 'configs/classification/lska-van-tiny_4xb128_in1k.py'


@pytest.fixture(scope='module')
def cfg():
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmpretrain')
    return cfg


def test_what_decays(cfg):
    """timm's rule, and what it says of names and dimensions."""
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def by_decay(groups):
        found = {0.0: set(), 0.05: set()}
        for group in groups:
            found[group['weight_decay']] |= {names[id(p)] for p in group['params']}
        return found

    ours = by_decay(optimizer.param_groups)
    assert ours == by_decay(param_groups_weight_decay(model, 0.05))
    flat = {name for name, p in model.named_parameters() if p.dim() == 1 or name.endswith('bias')}
    assert ours[0.0] == flat
    assert len(flat) == 229  # biases, norms and layer scales
    assert 'backbone.block1.0.layer_scale_1' in flat


def test_the_rate_of_each_epoch(cfg):
    def optimizer():
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)

    theirs = optimizer()
    schedule = CosineLRScheduler(
        theirs, t_initial=300, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1
    )
    own = optimizer()
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=own))
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for epoch in range(cfg.train_cfg.max_epochs):
        schedule.step(epoch)
        rates.append((own.param_groups[0]['lr'], theirs.param_groups[0]['lr']))
        own.step()
        for scheduler in schedulers:
            scheduler.step()
    largest = max(abs(a - b) / b for a, b in rates)
    print(f'{len(rates)} epochs, rates differ by {largest:.1e} of themselves at most')
    assert len(rates) == 310
    assert largest < 5e-4
    assert [rate for rate, _ in rates[-10:]] == pytest.approx([1e-6] * 10)


def test_interpolation_is_drawn_and_colors_are_left_to_randaugment(cfg):
    pipeline = cfg.train_dataloader.dataset.pipeline
    kinds = [step.type for step in pipeline]
    assert kinds == ['LoadImageFromFile', 'RandomChoice', 'RandomErasing', 'PackInputs']
    drawn = [
        {crop.interpolation, augment.hparams.interpolation}
        for crop, _, augment in pipeline[1].transforms
    ]
    assert drawn == [{'bilinear'}, {'bicubic'}]
    image = torch.randint(256, (300, 400, 3), dtype=torch.uint8).numpy()
    results = TRANSFORMS.build(pipeline[1])(dict(img=image))
    assert results['img'].shape == (224, 224, 3)
