"""Hooks that stop a training which would come to nothing, and say why."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.utils import apply_to
from torch import Tensor, nn

from .checkpoint import check_state_dict, unwrap
from .data import seed_everything
from .loader import get_state_dict


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Refuses to test a checkpoint that does not hold the whole model.

    Raises:
        CheckpointError: See `lska_mm.checkpoint.check_state_dict`.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare it with the model, before MMEngine loads what fits."""
        state_dict = get_state_dict(checkpoint)
        check_state_dict(runner.model, state_dict, runner._load_from, allow_extra=True)


@HOOKS.register_module()
class CheckLabelsHook(Hook):
    """Stops a segmentor at a label map that its classes do not cover.

    Without it a label beyond the classes is an index error on a CPU, a device
    assertion on a GPU, and goes unnoticed in a test's mIoU.

    Raises:
        ValueError: Names the file, the labels in it, and those that are valid.
    """

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a batch for training."""
        self._check(runner, data_batch)

    def before_val_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a batch for validation."""
        self._check(runner, data_batch)

    def before_test_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a batch for testing."""
        self._check(runner, data_batch)

    def _check(self, runner, data_batch) -> None:
        head = _decode_head(runner.model)
        if head is None:  # no segmentor
            return
        num_classes, ignore = head.num_classes, head.ignore_index
        samples = data_batch['data_samples']
        for sample in samples if isinstance(samples, Sequence) else [samples]:
            # Test-time augmentation has a list of views of an image here.
            sample = sample[0] if isinstance(sample, Sequence) else sample
            if 'gt_sem_seg' not in sample:
                continue
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= num_classes) & (labels != ignore)]
            if len(wrong):
                shift = (
                    ', each one less than in the file (reduce_zero_label)'
                    if sample.get('reduce_zero_label')
                    else ''
                )
                raise ValueError(
                    f'{sample.get("seg_map_path", "A label map")} has the labels '
                    f'{torch.unique(wrong).tolist()}{shift}; the model has {num_classes} '
                    f'classes: valid are 0 to {num_classes - 1}, and {ignore} for no class. '
                    'Correct the file, or num_classes and the classes of the dataset.'
                )


def _decode_head(model: Any) -> Any:
    """The last head of a segmentor; None of another model."""
    head = getattr(unwrap(model), 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head  # several: a cascade


class NonFiniteError(RuntimeError):
    """A loss, a weight or a gradient is infinite or not a number."""


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops at the first loss that is infinite or not a number, and says where it is from.

    The weights are still those before the step then: the step is computed once
    more, and the first module is named that makes non-finite values of finite
    ones. Weights that are not finite are never saved. Looking at the loss waits
    for a GPU once in a step.

    Raises:
        NonFiniteError: Names the step and the module, weight or loss.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def before_train(self, runner) -> None:
        """Look at each loss before the weights are updated by it."""
        wrapper = runner.optim_wrapper
        update = wrapper.update_params

        def checked(loss: Tensor, *args, **kwargs) -> None:
            if not loss.isfinite().all():
                raise NonFiniteError(self._explain(runner))
            update(loss, *args, **kwargs)

        wrapper.update_params = checked

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch, should it have to be computed once more."""
        self._batch = data_batch

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep weights that are not finite out of checkpoints."""
        name = _first_non_finite(checkpoint['state_dict'].items())
        if name:
            raise NonFiniteError(
                f'Step {runner.iter + 1}: the weights are not finite (first: {name}), so '
                f'no checkpoint was written. {self._advice(runner)}'
            )

    def _explain(self, runner) -> str:
        step = f'Step {runner.iter + 1}: the loss is not finite'
        name = _first_non_finite(runner.model.named_parameters())
        if name:
            reason = f'since the step before made weights so (first: {name})'
        else:
            reason = _trace(runner, self._batch)
        return f'{step}, {reason}. {self._advice(runner)}'

    @staticmethod
    def _advice(runner) -> str:
        rates = [rate for group in runner.optim_wrapper.get_lr().values() for rate in group]
        return (
            f'The learning rate is {max(rates):.2g}: lower it, warm up for longer, or clip '
            'gradients (optim_wrapper.clip_grad), and --resume from the last checkpoint.'
        )


def _first_non_finite(named: Iterator[tuple[str, Tensor]] | Any) -> str | None:
    return next(
        (name for name, value in named if value.is_floating_point() and not is_finite(value)),
        None,
    )


def is_finite(values: Any) -> bool:
    """Whether all tensors in nested containers are finite."""
    finite = True

    def look(tensor: Tensor) -> Tensor:
        nonlocal finite
        finite = finite and bool(tensor.isfinite().all())
        return tensor

    apply_to(values, lambda value: isinstance(value, Tensor), look)
    return finite


def _trace(runner, batch: Any) -> str:
    """Compute a step once more and name the first module that breaks it."""
    model = unwrap(runner.model)
    culprit: str | None = None

    def watch(name: str, module: nn.Module) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal culprit
            if culprit is None and not is_finite(output):
                culprit = f'{name} ({type(module).__name__}), the first module with such values'

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        seed_everything(runner.seed, runner.iter)
        # With gradients: without them some modules are computed together.
        with runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(batch, True)
            losses = model._run_forward(data, mode='loss')
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, value in losses.items() if not is_finite(value)]
    origin = culprit or 'none of the modules: the loss functions themselves'
    return f'from {origin}; losses concerned: {", ".join(names) or "none this time"}'
