"""Several processes without a GPU, and the loss of one of them."""

import atexit
import contextlib
import inspect
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS, STRATEGIES
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.nn.functional import all_reduce

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 5.0  # seconds without one: the rank is lost
# MMEngine's 'full', but that offloads to the CPU: PyTorch frees, then reads, what is there.
FULL_STATE_DICT = dict(
    state_dict_type='FULL_STATE_DICT',
    state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
    optim_state_dict_config=dict(
        type='FullOptimStateDictConfig', rank0_only=True, offload_to_cpu=False
    ),
)
TIMEOUT = 1800  # of a collective, in seconds, where the config names none: PyTorch's own


class LostRankError(RuntimeError):
    """A process of the job answers no more."""


# --- On a CPU --------------------------------------------------------------------


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What PyTorch's class does on GPUs alone: one normalisation over all processes.

    Mean and variance are taken one after the other, since the difference of
    the mean square and the squared mean loses digits. No subclass of PyTorch's,
    which its DDP refuses on a CPU.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the channels of an input (B, C, ...)."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        size = x.new_tensor([x.numel() / x.size(1)])
        total = all_reduce(torch.cat([x.sum(axes), size]))
        mean, count = total[:-1] / total[-1], total[-1]
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self.num_batches_tracked += 1
            # A cumulative mean, where no momentum is given.
            rate = self.momentum or 1 / self.num_batches_tracked.item()
            with torch.no_grad():
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * count / (count - 1), rate)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper without a device; SyncBN works in it (`CPUSyncBatchNorm`)."""

    def __init__(self, module: nn.Module, device_ids=None, **kwargs) -> None:
        for part in module.modules():
            if type(part) is nn.SyncBatchNorm:
                # The same parameters and buffers.
                part.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
        super().__init__(module, device_ids=None, **kwargs)


@STRATEGIES.register_module(name='FSDPStrategy', force=True)
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy, in its place, which can go on from its own checkpoints.

    MMEngine gives PyTorch the state of the optimizer in the place of the model, as was
    right before PyTorch 2.1.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer."""
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(sharded)


# --- The process group --------------------------------------------------------------


def init(cfg: Config) -> None:
    """Make the process group that torchrun started this process for, where MMEngine cannot.

    Without a GPU it is of gloo, with wrappers for models that need no device: MMEngine
    would set a CUDA device and hand its number to DDP. With one it is MMEngine's own but
    after a restart, see `connect`. The timeout of a collective is MMEngine's,
    `env_cfg.dist_cfg.timeout` in seconds; a wrapper or a strategy of the config keeps
    what it says.
    """
    settings = cfg.get('env_cfg', {}).get('dist_cfg', {})
    if get_device() == 'cpu':
        _init_group('gloo', settings)
        _wrap_for_cpu(cfg)
    elif get_device() == 'cuda' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        _init_group(settings.get('backend', 'nccl'), settings)


def connect() -> dist.Store:
    """A connection to the store that the ranks met in, for keys of this attempt alone.

    The store is part of `torchrun` on the host of rank 0, at MASTER_ADDR and
    MASTER_PORT. It outlives the processes that torchrun starts anew, and PyTorch
    from 2.4 on would look for the others where they were before.
    """
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    return dist.PrefixStore(f'lska_mm/{attempt}', dist.TCPStore(address, port, is_master=False))


def _init_group(backend: str, settings: Mapping[str, Any]) -> None:
    place: dict[str, Any] = {}
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        place = dict(store=connect(), rank=rank, world_size=world_size)
    timeout = timedelta(seconds=settings.get('timeout', TIMEOUT))
    dist.init_process_group(backend, timeout=timeout, **place)


def _wrap_for_cpu(cfg: Config) -> None:
    data_parallel = dict(
        type='CPUDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    if cfg.get('runner_type') != 'FlexibleRunner':
        cfg.setdefault('model_wrapper_cfg', data_parallel)
        return
    strategy = cfg.setdefault('strategy', dict(type='DDPStrategy'))
    if strategy.type == 'FSDPStrategy':
        if not inspect.signature(torch.cpu.Stream).parameters:
            raise RuntimeError(
                f'FSDP of PyTorch {torch.__version__} needs GPUs; take DDP, or a newer PyTorch.'
            )
        strategy.setdefault('model_wrapper', dict(type='MMFullyShardedDataParallel'))
        strategy.model_wrapper.setdefault('device_id', 'cpu')
        if strategy.get('state_dict_cfg') == 'full':
            strategy.state_dict_cfg = FULL_STATE_DICT
    else:
        strategy.setdefault('model_wrapper', data_parallel)


# --- A lost process --------------------------------------------------------------


class Pulse:
    """A sign of life each second, in the store that the ranks met in.

    A connection of its own waits for nothing else.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = connect()
        self.verdict = ''  # of the rank that was the first to look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: nothing to tell it
            while not self._stop.wait(BEAT):
                self.store.add(f'beat/{self.rank}', 1)
                if self.store.add('looked', 0):
                    self.verdict = self.store.get('verdict').decode()

    def _look(self, seen: list[list[int]]) -> None:
        with contextlib.suppress(RuntimeError):
            for pause in (0, PATIENCE):
                time.sleep(pause)
                seen.append([self.store.add(f'beat/{i}', 0) for i in range(self.world)])

    def stop(self) -> None:
        """End the thread; it may hang in a dead connection."""
        self._stop.set()
        self._thread.join(timeout=BEAT)

    def find_lost(self) -> str:
        """Say which ranks show no life; nothing if all do. Takes some seconds."""
        seen: list[list[int]] = []
        # In a thread: a host that is off the network does not even refuse.
        looking = threading.Thread(target=self._look, args=(seen,), daemon=True)
        looking.start()
        looking.join(timeout=2 * PATIENCE)
        if self.verdict:
            return self.verdict
        if len(seen) < 2:
            address = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
            return f'the host of rank 0 does not answer (MASTER_ADDR {address})'
        lost = [i for i, (before, after) in enumerate(zip(*seen)) if before == after]
        names = ', '.join(str(rank) for rank in lost if rank != self.rank)
        verdict = f'rank {names} of {self.world} shows no sign of life' if names else ''
        if verdict:  # for those who learn of it later: the store ends with its host's ranks
            self.store.set('verdict', verdict)
            self.store.add('looked', 1)
            time.sleep(3 * BEAT)
        return verdict


@contextlib.contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Explain an error of PyTorch: which other process is gone, if one is.

    The survivors learn of it by a closed connection, or by the timeout of a
    collective.

    Raises:
        LostRankError: In place of the error; it names the ranks.
    """
    try:
        yield
    except RuntimeError as error:
        lost = pulse.find_lost() if pulse else ''
        if not lost:
            raise
        raise LostRankError(
            f'Rank {dist.get_rank()} stops: {lost}. What ended it is in the output of its own '
            'host; if there is nothing, look at the machine, and at the network between. Then '
            'start the job again on all hosts, with --resume.'
        ) from error


pulse: Pulse | None = None


def start_pulse() -> None:
    """Give signs of life from now on, where `torchrun` or Slurm started several processes."""
    global pulse
    if pulse is None and dist.is_initialized() and 'MASTER_PORT' in os.environ:
        pulse = Pulse()
