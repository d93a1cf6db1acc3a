"""Hooks for configs, and the one with which `tools/test.py` refuses random weights."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ..weights.match import load_whole, unwrap

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class CheckWeightsHook(Hook):
    """Refuse to test a checkpoint that leaves a part of the model random.

    Raises:
        CheckpointError: See `lska_mm.weights.match.load_whole`.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the model, before MMEngine loads what fits."""
        load_whole(runner.model, checkpoint, runner._load_from)


@HOOKS.register_module()
class CheckLabelsHook(Hook):
    """Stop a segmentor at a label that is not one of its classes.

    Without it, such a label is an index error on a CPU, a device assertion on a GPU,
    and goes unnoticed in a test's mIoU.

    Raises:
        ValueError: Names the file, the labels in it, and those that are valid.
    """

    def _before_iter(self, runner, batch_idx, data_batch=None, mode='train') -> None:
        """Check a batch for training, validation or test."""
        head: Any = getattr(unwrap(runner.model), 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head  # a cascade
        if not hasattr(head, 'num_classes') or not isinstance(data_batch, dict):
            return
        # One channel distinguishes two classes.
        num_classes = 2 if getattr(head, 'out_channels', None) == 1 else head.num_classes
        samples = data_batch.get('data_samples') or []
        for sample in samples if isinstance(samples, Sequence) else [samples]:
            # With test-time augmentation it is a list of views of an image.
            sample = sample[0] if isinstance(sample, Sequence) else sample
            if 'gt_sem_seg' not in sample:
                continue
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= num_classes) & (labels != head.ignore_index)]
            if len(wrong):
                shift = (
                    ', one less than in the file (reduce_zero_label)'
                    if sample.get('reduce_zero_label')
                    else ''
                )
                raise ValueError(
                    f'{sample.get("seg_map_path", "A label map")} has the labels '
                    f'{torch.unique(wrong).tolist()}{shift}; the model has {num_classes} '
                    f'classes: valid labels are 0 to {num_classes - 1}, {head.ignore_index} for '
                    'no class. Fix the file, or num_classes and the classes of the dataset; '
                    'files that count from 1 need reduce_zero_label=True there.'
                )


@HOOKS.register_module()
class CompileHook(Hook):
    """Train with parts of the model compiled by `torch.compile`.

    MMEngine's ``compile=True`` compiles whole training steps, which fails for most
    detectors; their backbones can be compiled. In a config, with arguments of
    `torch.compile`:

        custom_hooks = [dict(type='CompileHook', modules=['backbone'], dynamic=True)]

    Validation, averaged weights and the names in checkpoints are the same as without it.
    A part with SyncBN, which waits for other processes, is compiled in pieces between
    the norms.

    Args:
        modules: Names of the submodules to compile.
        arguments: Of `torch.compile`; ``dynamic=True`` is for images of varying sizes.

    Raises:
        ValueError: If the model has no such part; names those that it has.
    """

    def __init__(self, modules: Sequence[str] = ('backbone',), **arguments: Any) -> None:
        self.modules, self.arguments = list(modules), arguments
        self.compiled: list[tuple[nn.Module, Any]] = []

    def before_train(self, runner) -> None:
        """Mark the parts for compilation, which happens in the first step."""
        model = unwrap(runner.model)
        for name in self.modules:
            try:
                part = model.get_submodule(name)
            except AttributeError:
                parts = ', '.join(name for name, _ in model.named_children())
                raise ValueError(
                    f'CompileHook cannot find {name!r} in {type(model).__name__}; modules=[...] '
                    f'takes names of its parts: {parts}.'
                ) from None
            pieces = list(_without_sync_bn(part))
            for piece in pieces:
                piece.compile(**self.arguments)
                self.compiled.append((piece, piece._compiled_call_impl))
            several = f' in {len(pieces)} pieces, as it has SyncBN' if pieces != [part] else ''
            runner.logger.info(
                f'{name} will be compiled in the first step, which may take minutes{several}: '
                f'{self.arguments}'
            )

    def before_val(self, runner) -> None:
        """Switch to the uncompiled parts."""
        for piece, _ in self.compiled:
            vars(piece).pop('_compiled_call_impl', None)  # None would be a change, too

    def after_val(self, runner) -> None:
        """Switch back to the compiled parts."""
        for piece, function in self.compiled:
            piece._compiled_call_impl = function

    def after_train(self, runner) -> None:
        """Restore the model."""
        self.before_val(runner)
        self.compiled = []


def _without_sync_bn(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest composite submodules without SyncBN, torch's or mmcv's."""
    if not any('SyncBatchNorm' in type(part).__name__ for part in module.modules()):
        yield module
    else:
        for child in module.children():
            if next(child.children(), None) is not None:
                yield from _without_sync_bn(child)


@HOOKS.register_module()
class SaveOnSignalHook(Hook):
    """Save and exit when a scheduler sends a signal.

    After the step in which a process receives SIGTERM or SIGUSR1, rank 0 saves a
    checkpoint for ``--resume``, and all processes exit with code 75. Data-loading
    workers ignore SIGUSR1, but SIGTERM ends them, as usual in torch.

    Raises:
        RuntimeError: If the training does not run in the main thread, the only one
            that can receive signals.
    """

    priority = 'LOWEST'  # after what other hooks do to model and schedule

    def __init__(self) -> None:
        self.asked, self.group, self.handlers = False, None, dict[int, Any]()
        with suppress(RuntimeError):  # in another thread only training is an error
            self._listen('SIGUSR1')  # before an endless loader starts workers

    def before_train(self, runner) -> None:
        """Start to listen for signals."""
        self._listen('SIGUSR1', 'SIGTERM')
        if is_distributed():
            self.group = dist.new_group(backend='gloo')  # on the host: no GPU has to wait

    def _listen(self, *names: str) -> None:
        known = {s.name: s for s in signal.Signals}  # Windows has no SIGUSR1
        try:
            for number in {known[name] for name in names if name in known} - self.handlers.keys():
                self.handlers[number] = signal.signal(number, self._ask)
        except ValueError:
            raise RuntimeError(
                'SaveOnSignalHook needs the main thread, the only one that can receive signals: '
                'train there, or remove the hook from custom_hooks.'
            ) from None

    def _ask(self, number: int, frame) -> None:
        self.asked = True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save and exit, if any process received a signal."""
        asked = torch.tensor(int(self.asked))  # later signals count for the next step
        if self.group:
            dist.all_reduce(asked, dist.ReduceOp.MAX, self.group)
        if not asked:
            return
        path = Path(runner.work_dir, f'iter_{runner.iter + 1}.pth')
        runner.save_checkpoint(runner.work_dir, path.name, by_epoch=False)
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
        runner.logger.warning(
            f'Received a signal: saved {path}; continue with --resume. Exit code {EXIT_CODE}.'
        )
        if self.group:  # torchrun ends all when one exits: wait for the file
            with suppress(RuntimeError):  # another has passed here and exited
                dist.barrier(self.group)
        sys.exit(EXIT_CODE)

    def after_train(self, runner) -> None:
        """Restore the previous handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers, self.asked = {}, False
