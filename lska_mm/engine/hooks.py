"""Hooks that configs name, and the one by which `tools/test.py` refuses random weights."""

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
from ..weights.names import get_state_dict

EXIT_CODE = 75  # sysexits.h: a failure after which one should try again


class CheckWeightsHook(Hook):
    """Refuse to test a checkpoint that leaves a part of the model random.

    Raises:
        CheckpointError: See `lska_mm.weights.match.load_whole`.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare it with the model, before MMEngine loads what fits."""
        load_whole(runner.model, get_state_dict(checkpoint), runner._load_from)


@HOOKS.register_module()
class CheckLabelsHook(Hook):
    """Stop a segmentor at a label map that its classes do not cover.

    Such a label is an index error on a CPU, a device assertion on a GPU, and goes
    unnoticed in a test's mIoU.

    Raises:
        ValueError: Names the file, the labels in it, and those that are valid.
    """

    def _before_iter(self, runner, batch_idx, data_batch=None, mode='train') -> None:
        """Check a batch for training, validation or test."""
        head: Any = getattr(unwrap(runner.model), 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head  # of a cascade
        if not hasattr(head, 'num_classes') or not isinstance(data_batch, dict):
            return
        # One channel tells two classes apart.
        num_classes = 2 if getattr(head, 'out_channels', None) == 1 else head.num_classes
        samples = data_batch.get('data_samples') or []
        for sample in samples if isinstance(samples, Sequence) else [samples]:
            # Test-time augmentation has a list of views of an image here.
            sample = sample[0] if isinstance(sample, Sequence) else sample
            if 'gt_sem_seg' not in sample:
                continue
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= num_classes) & (labels != head.ignore_index)]
            if len(wrong):
                shift = (
                    ', each one less than in the file (reduce_zero_label)'
                    if sample.get('reduce_zero_label')
                    else ''
                )
                raise ValueError(
                    f'{sample.get("seg_map_path", "A label map")} has the labels '
                    f'{torch.unique(wrong).tolist()}{shift}; the model has {num_classes} '
                    f'classes: valid are 0 to {num_classes - 1}, and {head.ignore_index} for no '
                    'class. Correct the file, or num_classes and the classes of the dataset.'
                )


@HOOKS.register_module()
class CompileHook(Hook):
    """Train with parts of the model compiled by `torch.compile`.

    MMEngine's ``compile=True`` compiles whole training steps, which fails for most
    detectors; their backbones can be compiled. In a config, with arguments of
    `torch.compile`:

        custom_hooks = [dict(type='CompileHook', modules=['backbone'], dynamic=True)]

    Validation and averaged weights stay as they are without it, and so do the names in
    checkpoints. A part in which SyncBN waits for other processes is compiled piece by
    piece, between the norms.

    Args:
        modules: Names of the parts in the model.
        arguments: Of `torch.compile`; ``dynamic=True`` is for images of varying sizes.

    Raises:
        ValueError: If the model has no such part; names those that it has.
    """

    def __init__(self, modules: Sequence[str] = ('backbone',), **arguments: Any) -> None:
        self.modules, self.arguments = list(modules), arguments
        self.compiled: list[tuple[nn.Module, Any]] = []

    def before_train(self, runner) -> None:
        """Compile the parts; the compiler works in the first step."""
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
            runner.logger.info(f'{name} is compiled for training{several}: {self.arguments}')

    def before_val(self, runner) -> None:
        """Validate what is not compiled."""
        for piece, _ in self.compiled:
            vars(piece).pop('_compiled_call_impl', None)  # None would be a change, too

    def after_val(self, runner) -> None:
        """Train what is compiled."""
        for piece, function in self.compiled:
            piece._compiled_call_impl = function

    def after_train(self, runner) -> None:
        """Leave the model as it was."""
        self.before_val(runner)
        self.compiled = []


def _without_sync_bn(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of several modules that have no SyncBN, torch's or mmcv's."""
    if not any('SyncBatchNorm' in type(part).__name__ for part in module.modules()):
        yield module
    else:
        for child in module.children():
            if next(child.children(), None) is not None:
                yield from _without_sync_bn(child)


@HOOKS.register_module()
class SaveOnSignalHook(Hook):
    """Save and end when a scheduler asks for it, before it kills.

    After the step in which a process receives SIGTERM or SIGUSR1, rank 0 saves
    what ``--resume`` goes on from, and all processes end with exit code 75. Workers
    that load data pass over SIGUSR1, but end by SIGTERM, as torch has it.

    Raises:
        RuntimeError: If the training does not run in the main thread, where alone
            signals can be received.
    """

    priority = 'LOWEST'  # after what other hooks do to model and schedule

    def __init__(self) -> None:
        self.asked, self.group, self.handlers = False, None, dict[int, Any]()
        with suppress(RuntimeError):  # elsewhere it may still be for a test
            self._listen('SIGUSR1')  # workers of an endless loader start with the loop

    def before_train(self, runner) -> None:
        """Listen from now on."""
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
                'SaveOnSignalHook needs the main thread, where alone signals can be received: '
                'train there, or take the hook out of custom_hooks.'
            ) from None

    def _ask(self, number: int, frame) -> None:
        self.asked = True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save and end, if any process was asked to."""
        asked = torch.tensor(int(self.asked))  # a signal from here on is for the next step
        if self.group:
            dist.all_reduce(asked, dist.ReduceOp.MAX, self.group)
        if not asked:
            return
        path = Path(runner.work_dir, f'iter_{runner.iter + 1}.pth')
        runner.save_checkpoint(runner.work_dir, path.name, by_epoch=False)
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
        runner.logger.warning(
            f'Asked to end: {path} is saved; go on with --resume. Exit code {EXIT_CODE}.'
        )
        if self.group:  # torchrun ends all when one has ended: not before it is saved
            with suppress(RuntimeError):  # one has ended, and so had passed here
                dist.barrier(self.group)
        sys.exit(EXIT_CODE)

    def after_train(self, runner) -> None:
        """Listen no more."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers, self.asked = {}, False
