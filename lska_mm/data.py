"""Samples that depend on their place in the training and on nothing else.

MMEngine draws augmentation from generators that run on, in the process or in
each worker, so that an interrupted training cannot find back to where it was.
Here every draw from the dataset has its own seed, made of the training's seed
and the draw's place: the same with any number of workers, and after `--resume`.
"""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from PIL import Image
from torch.utils.data import BatchSampler, Dataset, Sampler


class DataError(RuntimeError):
    """A sample that cannot be used; names its file."""


def seed_everything(*place: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch for a place in the training."""
    python, numpy, pytorch = np.random.SeedSequence(place).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


@contextmanager
def _seeded(*place: int) -> Iterator[None]:
    """Seed the generators for a while; afterwards they go on as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(*place)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Draw(int):
    """An index into a dataset, and ``place``, which seeds what is made of it."""

    place: tuple[int, ...]

    def __new__(cls, index: int, place: tuple[int, ...]) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.place = place
        return draw

    def __getnewargs__(self) -> tuple[int, tuple[int, ...]]:  # type: ignore[override]
        return int(self), self.place


@DATA_SAMPLERS.register_module()
class SeededBatches(BatchSampler):
    """Batches of another batch sampler, whose indices are `Draw`.

    Args:
        sampler: Gives the indices.
        batch_size: Images of a process in a step.
        batch_sampler: Config of what makes batches of the indices; consecutive
            ones if None.
        drop_last: Leave an incomplete last batch out; without ``batch_sampler``.
        iter: Steps that were trained before: the first pass begins after them.
        epoch: Passes over the dataset that were completed before.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        batch_sampler: dict | None = None,
        drop_last: bool = False,
        iter: int = 0,
        epoch: int = 0,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size  # FlexibleRunner asks for it
        if batch_sampler is None:
            self.batches = BatchSampler(sampler, batch_size, drop_last)
        else:
            self.batches = DATA_SAMPLERS.build(
                batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size)
            )
        self.skip = iter - epoch * len(self.batches)
        if epoch and not 0 <= self.skip <= len(self.batches):
            self.skip = 0  # another batch size or number of processes: the epoch anew

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        start = (getattr(self.sampler, 'seed', 0), getattr(self.sampler, 'epoch', 0))
        for number, batch in enumerate(self.batches):
            if number >= skip:
                yield [
                    Draw(index, (*start, number, place, index))
                    for place, index in enumerate(batch)
                ]


@DATASETS.register_module()
class GuardedDataset(Dataset):
    """Another dataset, seeded for each `Draw`; its errors name the file.

    Attributes and methods are the other dataset's.

    Args:
        dataset: Config of the other dataset.
        max_bad_images: So many images that cannot be read are each replaced
            by another one, drawn at random, with a warning; one more is an error.

    Raises:
        DataError: If there is no sample, no annotation to train on, or a class is
            not in an annotation file.
        ValueError: If ``max_bad_images`` is no number of images.
    """

    _OWN = ('dataset', 'max_bad_images', 'images', 'bad', 'seen')

    def __init__(self, dataset: dict, max_bad_images: int = 0) -> None:
        if not isinstance(max_bad_images, int) or max_bad_images < 0:
            raise ValueError(f'max_bad_images={max_bad_images!r} is no number of images.')
        try:
            self.dataset = DATASETS.build(dataset)
            if hasattr(self.dataset, 'full_init'):
                self.dataset.full_init()
        except Exception as error:  # of any kind: what broke is the data
            raise DataError(f'No dataset from {_source(dataset)}: {_in_a_line(error)}') from error
        for part in _parts(self.dataset):
            _check_content(part)
        self.max_bad_images = max_bad_images
        # The first index of each one's image, which wrappers may draw several times.
        _, firsts, numbers = np.unique(
            _images(self.dataset), return_index=True, return_inverse=True
        )
        self.images = firsts[numbers]
        # Of these; for all workers.
        self.bad, self.seen = torch.zeros(2, len(self.dataset), dtype=torch.bool).share_memory_()

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not yet there, while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks give datasets another pipeline.
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The sample at an index.

        Raises:
            DataError: If it cannot be made.
        """
        if not isinstance(index, Draw):
            return self._get(index)
        with _seeded(*index.place):
            return self._get(int(index))

    def _get(self, index: int) -> Any:
        while True:
            try:
                self._check_size(index)
                return self.dataset[index]
            except Exception as error:  # of any kind: what broke is the data
                message = f'{self.file_of(index)}: {_in_a_line(error)}'
                if not self.bad[self.images[index]]:
                    print_log(f'Cannot be used: {message}', 'current', logging.WARNING)
                self.bad[self.images[index]] = True
                if self.bad.sum() > self.max_bad_images or self.bad[self.images].all():
                    raise DataError(
                        f'{message}. Mend or remove the file; or train with others in the '
                        'place of up to N such images: --cfg-options max_bad_images=N.'
                    ) from error
                index = np.random.randint(len(self))

    def _check_size(self, index: int) -> None:
        """Polygons far outside a small image take pycocotools tens of GiB: look at it first."""
        info = self._info(index)
        path, noted = info.get('img_path') or '', (info.get('width'), info.get('height'))
        if self.seen[self.images[index]] or None in noted or not os.path.isfile(path):
            return
        with Image.open(path) as image:
            if image.size not in (noted, noted[::-1]):  # a camera may have been turned
                raise ValueError(f'{image.size} is its size, {noted} that of its annotations')
        self.seen[self.images[index]] = True

    def _info(self, index: int) -> dict:
        describe = getattr(self.dataset, 'get_data_info', None)
        return describe(index) if describe else {}

    def file_of(self, index: int) -> str:
        """The files of a sample, as far as the dataset knows them."""
        info = self._info(index)
        files = [info[key] for key in ('img_path', 'seg_map_path') if info.get(key)]
        return ' with '.join(files) or f'sample {index} of {type(self.dataset).__name__}'


def _in_a_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _source(dataset: Any) -> str:
    """Where a dataset, or the config of one, has its data from."""
    if isinstance(dataset, dict):
        if 'dataset' in dataset:  # RepeatDataset and the like
            return _source(dataset['dataset'])
        if 'datasets' in dataset:  # ConcatDataset
            return ', '.join(map(_source, dataset['datasets']))
    else:
        names = ('ann_file', 'data_prefix', 'split', 'data_root')
        dataset = dict(
            {name: getattr(dataset, name, None) for name in names}, type=type(dataset).__name__
        )
    found = dataset.get('ann_file') or dataset.get('data_prefix') or dataset.get('split') or ''
    if isinstance(found, dict):
        found = ' and '.join(map(str, found.values()))
    return f'{dataset.get("type")} with {found} in {dataset.get("data_root") or "no data_root"}'


def _parts(dataset: Any) -> list[Any]:
    """The datasets below RepeatDataset, ConcatDataset and the like."""
    if hasattr(dataset, 'datasets'):
        return [part for one in dataset.datasets for part in _parts(one)]
    return _parts(dataset.dataset) if hasattr(dataset, 'dataset') else [dataset]


def _images(dataset: Any) -> np.ndarray:
    """A number of the image of each sample, the same where a wrapper repeats it."""
    if hasattr(dataset, 'datasets'):
        starts = np.cumsum([0, *map(len, dataset.datasets)])
        parts = zip(dataset.datasets, starts)
        return np.concatenate([_images(one) + start for one, start in parts])
    numbers = np.arange(len(dataset))
    if not hasattr(dataset, '_get_ori_dataset_idx'):
        return numbers
    return _images(dataset.dataset)[[dataset._get_ori_dataset_idx(i) for i in numbers]]


def _check_content(dataset: Any) -> None:
    if not len(dataset):
        raise DataError(
            f'No sample in {_source(dataset)}: it has no image, or images without annotations '
            'alone, which training leaves out (filter_cfg).'
        )
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    categories = getattr(dataset, 'cat_ids', classes)
    if len(categories) < len(classes):
        raise DataError(
            f'{_source(dataset)} knows {len(categories)} of the {len(classes)} classes of the '
            'config, and would number them otherwise. Name the same classes, in the order of '
            'the file, in metainfo of the datasets.'
        )
    if getattr(dataset, 'test_mode', True) or not hasattr(dataset, 'get_data_info'):
        return
    infos = map(dataset.get_data_info, range(len(dataset)))
    if not any(info.get('instances', True) for info in infos):
        raise DataError(
            f'No annotation in {_source(dataset)}: none of its {len(dataset)} images has an '
            'instance of the classes to train on.'
        )


@HOOKS.register_module()
class BadImagesHook(Hook):
    """Says at the end of an epoch how many images were replaced by others."""

    def after_train_epoch(self, runner) -> None:
        """Log the number of images replaced so far, and the first of them."""
        dataset = runner.train_dataloader.dataset
        bad = dataset.bad.nonzero().flatten().tolist()
        if bad:
            runner.logger.warning(
                f'{len(bad)} of {len(set(dataset.images))} images could not be used and were '
                f'replaced by others (first: {dataset.file_of(bad[0])}).'
            )
