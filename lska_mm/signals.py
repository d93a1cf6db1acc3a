"""SIGTERM, as schedulers send it before they kill: a training saves, its workers go on."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from copy import copy
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import is_distributed, is_main_process
from mmengine.fileio import join_path
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import FUNCTIONS, HOOKS

from .files import whole_file

# What a process ends with when it was asked to go and saved everything before:
# sysexits.h calls this code a failure after which one should try again.
EXIT_CODE = 75


def worker_context() -> BaseContext | None:
    """What starts workers that no SIGTERM ends before `pass_over_sigterm` runs in them.

    None where they are not forked, or the system does not say who sent a signal
    (macOS, Windows).
    """
    if not hasattr(signal, 'sigwaitinfo') or multiprocessing.get_start_method() != 'fork':
        return None
    context = copy(multiprocessing.get_context('fork'))

    class Worker(context.Process):  # type: ignore[name-defined]
        def start(self) -> None:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    context.Process = Worker  # type: ignore[misc]
    return context


@FUNCTIONS.register_module()
def pass_over_sigterm(worker_id: int, disable_subprocess_warning: bool = False) -> None:
    """Let a worker that loads data end by the SIGTERM of its parent alone.

    Schedulers send one to every process of a job, but the step in progress
    needs the workers. Takes the place of MMEngine's function for new workers.

    Args:
        worker_id: Among those of the dataloader, from 0.
        disable_subprocess_warning: Let the first worker alone give warnings.
    """
    if disable_subprocess_warning and worker_id:
        warnings.simplefilter('ignore')
    if not hasattr(signal, 'sigwaitinfo'):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


@HOOKS.register_module()
class SaveOnSignalHook(Hook):
    """Saves and ends when it is asked to, as schedulers do before they kill.

    After the step in which one of the processes receives SIGTERM, all of them
    end with the exit code 75, and ``interrupted.pth`` beside the other checkpoints
    is what ``--resume`` goes on from. With accumulated gradients the step is the one
    that uses them.
    """

    priority = 'LOWEST'  # after what other hooks do to model and schedule

    def __init__(self) -> None:
        self.asked = False
        self._group: Any = None

    def before_train(self, runner) -> None:
        """Listen from now on."""
        signal.signal(signal.SIGTERM, self._ask)
        if is_distributed():
            # Of its own, on the host: a GPU would have to wait for the answer.
            self._group = dist.new_group(backend='gloo')

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:  # fmt: skip
        """Save and end, if any process was asked to."""
        step = runner.iter + 1
        if self._any_asked() and _is_updated(runner, step):
            self._save(runner, step)

    def after_val_iter(self, runner, batch_idx: int, data_batch: Any = None,
                       outputs: Any = None) -> None:  # fmt: skip
        """Save and end amid a validation, which `DueValidationHook` will make up for."""
        # EMA has exchanged the weights then: this validation must end first.
        updated = _is_updated(runner, runner.iter)
        if not is_distributed() and self.asked and not averages_weights(runner) and updated:
            self._save(runner, runner.iter)

    def _any_asked(self) -> bool:
        if self._group is None:
            return self.asked
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return bool(asked)

    def _save(self, runner, step: int) -> None:
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        folder = hooks[0].out_dir if hooks else runner.work_dir
        name = 'interrupted.pth'
        meta = dict(epoch=runner.epoch, iter=step)
        runner.save_checkpoint(folder, name, meta=meta, by_epoch=False)
        path = join_path(folder, name)
        if is_main_process():
            with whole_file(Path(runner.work_dir, 'last_checkpoint'), 'w') as file:
                file.write(path)
        runner.logger.warning(
            f'SIGTERM: {path} holds everything up to step {step}; go on with --resume. '
            f'Exit code {EXIT_CODE}.'
        )
        sys.exit(EXIT_CODE)


def _is_updated(runner, step: int) -> bool:
    """Whether no gradients are accumulated after a step."""
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return step % counts == 0 or step == runner.max_iters


def averages_weights(runner) -> bool:
    """Whether an EMAHook exchanges the weights for their averages in validation."""
    return any(isinstance(hook, EMAHook) for hook in runner.hooks)
