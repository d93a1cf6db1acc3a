"""What users register beside a backbone."""

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets import BaseVideoDataset, CocoDataset
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, MODELS, TRANSFORMS
from torch import nn

from lska_mm import LSKAVAN


@MODELS.register_module()
class AdaptedLSKAVAN(LSKAVAN):
    """Has a convolution of its own on the last map."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.adapter = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        *first, last = super().forward(x)
        return (*first, self.adapter(last))


@TRANSFORMS.register_module()
class LoadBands(BaseTransform):
    """Reads an image of four bands, (H, W, 4), from a .npy file."""

    def transform(self, results):
        image = np.load(results['img_path'])
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results


@DATASETS.register_module()
class FilesOfChannels(CocoDataset):
    """Each channel of an image lies in a file of its own."""

    def parse_data_info(self, raw_data_info):
        info = super().parse_data_info(raw_data_info)
        info['img_path'] = [info['img_path']] * 3
        return info


@DATASETS.register_module()
class Clips(BaseVideoDataset):
    """Two clips of two frames; TrackImgSampler asks for a clip and a frame in it."""

    METAINFO = dict(classes=('a', 'b'))


@HOOKS.register_module()
class ReadsTheDataloader(Hook):
    """Looks at what a config names for loading, as hooks of users do."""

    def before_train_epoch(self, runner):
        loader = runner.train_dataloader
        assert type(loader.dataset).__name__ == runner.cfg.train_dataloader.dataset.type
        assert (
            type(loader.batch_sampler.sampler).__name__ == runner.cfg.train_dataloader.sampler.type
        )
        assert type(loader.batch_sampler).__name__ == 'AspectRatioBatchSampler'
        loader.dataset.pipeline.transforms.append(loader.dataset.pipeline.transforms.pop())
