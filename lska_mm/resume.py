"""Training that can be interrupted at any moment and loses nothing.

What is drawn at random in a step depends on the training's seed and on the
step's number alone, see also `lska_mm.data`. So a checkpoint needs to hold no
state of a generator, and a training continued from it ends with the weights of
one that was never interrupted.
"""

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import (
    CheckpointLoader,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
)

from .checkpoint import CheckpointError, check_state_dict
from .data import seed_everything
from .hooks import is_finite
from .signals import averages_weights


def find_checkpoint(work_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint that training can go on from.

    Args:
        work_dir: Of the training. If no checkpoint is there, its file
            ``last_checkpoint`` may lead elsewhere.

    Returns:
        The file and its ``meta``; None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints, and none can be read.
    """
    files = _newest_first(work_dir)
    last = Path(work_dir, 'last_checkpoint')
    named = last.read_text().strip() if last.is_file() else ''
    if named and not files:
        files = _newest_first(Path(named).parent)
    problems = []
    for file in files:
        try:
            return str(file), read_meta(file)
        except CheckpointError as error:
            problems.append(f'{error}')
            print_log(f'--resume passes over a checkpoint. {error}', 'current', logging.WARNING)
    if problems:
        raise CheckpointError(
            f'--resume: {work_dir} has {len(files)} checkpoints, and none can be continued. '
            f'The newest: {problems[0]} Name another with --resume CKPT, or train anew in '
            'another --work-dir.'
        )
    return None


def _newest_first(folder: str | Path) -> list[Path]:
    files = Path(folder).glob('*.pth')
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def read_meta(file: str | Path) -> dict[str, Any]:
    """The ``meta`` of a checkpoint that training can go on from.

    Raises:
        CheckpointError: If it is damaged, a folder, or holds only a model.
    """
    if Path(file).is_dir():
        raise CheckpointError(
            f'{file} is a folder of shards: save whole files '
            '(strategy.state_dict_cfg=full) to go on exactly.'
        )
    content = CheckpointLoader.load_checkpoint(str(file), map_location='cpu')
    content = content if isinstance(content, Mapping) else {}
    parts = ('meta', 'state_dict', 'optimizer', 'message_hub')
    missing = [part for part in parts if not isinstance(content.get(part), Mapping)]
    if missing:
        raise CheckpointError(
            f'{file} has no {" and no ".join(missing)}: training can start from such a '
            'file (--cfg-options load_from=FILE), not go on from it.'
        )
    meta = content['meta']
    numbers = {name: meta.get(name) for name in ('iter', 'epoch')}
    numbers['seed'] = meta.get('seed', 0)
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 0:
            raise CheckpointError(f'{file} says {name}={number!r} in meta, which is no number.')
    return meta


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes what is random in a step depend on the seed and the step alone.

    For dropped paths, boxes that are sampled, mixed images and whatever else
    is drawn in the process that trains. Images have their own seeds.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """See that training goes on with the model and optimizer that it began with.

        Raises:
            CheckpointError: If the checkpoint is of others; says what differs.
        """
        if not runner._resume:
            return
        try:
            check_state_dict(runner.model, checkpoint['state_dict'], runner._load_from)
            self._check_training(runner, checkpoint)
        except CheckpointError as error:
            raise CheckpointError(
                f'--resume: {error} Take the config that it was trained with, or begin another '
                'training with its weights: --cfg-options load_from=FILE, without --resume.'
            ) from None

    @staticmethod
    def _check_training(runner, checkpoint: dict) -> None:
        problem = None
        if 'ema_state_dict' in checkpoint and not averages_weights(runner):
            problem = 'averages weights, and the config has no EMAHook in custom_hooks'
        elif isinstance(runner, Runner):  # FlexibleRunner's strategies change the state
            problem = _compare_optimizers(
                checkpoint['optimizer'], runner.optim_wrapper.state_dict()
            )
        if problem:
            raise CheckpointError(f'The training of {runner._load_from} {problem}.')

    def before_train(self, runner) -> None:
        """Keep MMEngine from reading again what was trained on before."""
        loop = runner.train_loop
        advances = not getattr(loop, 'fast_forward_on_resume', False)
        if isinstance(loop, IterBasedTrainLoop) and loop.iter and advances:
            loop.dataloader_iterator = _Advanced(loop.dataloader_iterator, loop.iter)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the generators of this process."""
        seed_everything(runner.seed, runner.iter)


def _compare_optimizers(found: Mapping, expected: Mapping) -> str | None:
    """What keeps an optimizer from taking over the state of another, in words."""
    groups, ours = found.get('param_groups'), expected.get('param_groups')
    if ours is None:  # several optimizers
        return None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return 'left no state of an optimizer'
    sizes, expected_sizes = ([len(group.get('params', ())) for group in g] for g in (groups, ours))
    if sizes != expected_sizes:
        return (
            f'optimizes {sum(sizes)} parameters in {len(sizes)} groups, the config '
            f'{sum(expected_sizes)} in {len(expected_sizes)}'
        )
    # Switches differ between versions of PyTorch, and have defaults.
    missing = {
        key
        for group, our in zip(groups, ours)
        for key, value in our.items()
        if key not in group and not isinstance(value, (bool, type(None)))
    }
    if missing:
        return f'has another optimizer than the config: one without {", ".join(sorted(missing))}'
    if not is_finite(found.get('state')):
        return 'left NaN or infinity in the state of the optimizer'
    return None


@HOOKS.register_module()
class DueValidationHook(Hook):
    """Makes up for the validation that was to follow the step of the checkpoint.

    A checkpoint is written before the validation at its step, and holds nothing
    of what comes of it: which checkpoint is the best, a rate that waits for a metric.
    """

    priority = 'LOWEST'  # when other hooks are ready

    def before_train(self, runner) -> None:
        """Validate, if the step or epoch that was the last before wants it."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            done, end, amid = loop.iter, loop.max_iters, False
        elif isinstance(loop, EpochBasedTrainLoop):
            done, end = loop.epoch, loop.max_epochs
            amid = bool(getattr(loop.dataloader.batch_sampler, 'skip', 0))
        else:
            return
        if not done or amid or runner.val_loop is None:
            return
        loop._decide_current_val_interval()
        if done >= loop.val_begin and (done % loop.val_interval == 0 or done == end):
            runner.logger.info('First the validation that was due at the step of the checkpoint:')
            runner.val_loop.run()


class _Advanced:
    """An iterator of batches that already stands where a loop wants to bring it."""

    def __init__(self, iterator: Any, steps: int) -> None:
        self.iterator = iterator
        self.steps = steps

    def skip_iter(self, steps: int) -> None:
        self.steps -= steps

    def __next__(self) -> Any:
        if self.steps > 0:
            self.steps -= 1
            return None
        return next(self.iterator)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, which deletes only what it has a successor for.

    Takes the same arguments. MMEngine's own deletes the oldest of
    ``max_keep_ckpts`` files first and writes the new one then, so that a kill
    in between may leave none.
    """

    max_keep_ckpts: int
    keep_ckpt_ids: deque

    def before_train(self, runner) -> None:
        """Find out where checkpoints go and which there are."""
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        keep = self.max_keep_ckpts
        if keep > 0:  # never as many as it may be, or MMEngine would delete one now
            self.max_keep_ckpts = len(self.keep_ckpt_ids) + 1
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = keep
        while keep > 0 and len(self.keep_ckpt_ids) > keep:
            outdated = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            path = self.file_backend.join_path(self.out_dir, outdated)
            if is_main_process():
                if self.file_backend.isdir(path):
                    self.file_backend.rmtree(path)
                elif self.file_backend.exists(path):
                    self.file_backend.remove(path)
