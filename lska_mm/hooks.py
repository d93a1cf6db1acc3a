"""A hook that looks at what a model is trained and tested on."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


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
        samples = data_batch['data_samples']
        for sample in samples if isinstance(samples, Sequence) else [samples]:
            # Test-time augmentation has a list of views of an image here.
            sample = sample[0] if isinstance(sample, Sequence) else sample
            if 'gt_sem_seg' not in sample:
                continue
            num_classes, ignore = _labels_of(runner.model)
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


def _labels_of(model: Any) -> tuple[int, int]:
    """How many classes a segmentor has, and the label that it ignores."""
    while hasattr(model, 'module'):  # DDP, TTA
        model = model.module
    head: Any = model.decode_head
    if isinstance(head, torch.nn.ModuleList):  # a cascade
        head = head[-1]
    return head.num_classes, head.ignore_index
