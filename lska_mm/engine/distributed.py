"""Training in several CPU processes, which MMEngine does not set up by itself."""

from datetime import timedelta

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed as dist
from torch import nn


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper for CPUs; SyncBN, which needs GPUs, becomes BatchNorm."""

    def __init__(self, module: nn.Module, device_ids=None, **kwargs) -> None:
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            module = revert_sync_batchnorm(module)
            print_log(
                'Without a GPU, SyncBN is plain BatchNorm: each process uses the statistics of '
                'its own images.',
                logger='current',
            )
        super().__init__(module, device_ids=None, **kwargs)


def init_cpu(cfg: Config) -> None:
    """Initialize the process group of torchrun on a machine without a GPU.

    MMEngine would select a CUDA device. Sets ``model_wrapper_cfg`` in ``cfg`` if it is not set.
    """
    if cfg.launcher != 'pytorch' or get_device() != 'cpu' or dist.is_initialized():
        return
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)  # torch's own
    dist.init_process_group('gloo', timeout=timedelta(seconds=timeout))
    cfg.setdefault(
        'model_wrapper_cfg',
        dict(
            type='CPUDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )
