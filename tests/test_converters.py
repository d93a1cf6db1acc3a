"""The converters of checkpoints and data, as a user runs them."""

import re
from pathlib import Path

import mmcv
import numpy as np
import torch
from pycocotools.coco import COCO

from conftest import ROOT
from lska_mm.weights.match import describe

CONVERT = 'tools/model_converters/convert_checkpoint.py'

# --- Checkpoints ---------------------------------------------------------------


def test_convert_checkpoint(run, published_file, tmp_path):
    printed = run('python', CONVERT, published_file, tmp_path / 'tiny.pth')
    assert "LSKAVAN(arch='tiny', attention='LSKA', kernel_size=23, in_channels=3)" in printed
    path = Path(printed.strip().splitlines()[-1].removeprefix('written to '))
    assert re.fullmatch(r'tiny-[0-9a-f]{8}\.pth', path.name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    content = torch.load(path, weights_only=True)
    assert describe(content['state_dict'])['kernel_size'] == 23
    assert f'{len(content["state_dict"])} tensors' in printed
    source = torch.load(published_file, weights_only=False)['state_dict']
    for ours, theirs in zip(content['state_dict'].values(), source.values()):
        assert torch.equal(ours, theirs)
    assert content['state_dict'].keys() >= {'head.fc.weight', 'backbone.norm4.bias'}
    again = run('python', CONVERT, path, tmp_path / 'again.pth')
    assert path.stem.split('-')[-1] in again  # idempotent, to the byte


# --- Data ----------------------------------------------------------------------


def test_nuclei_as_coco(nuclei):
    """The masks of both parts, put together, are the label map again."""
    labels = mmcv.imread(str(ROOT / 'demo/nuclei/labels.png'), flag='unchanged')
    image = mmcv.imread(str(ROOT / 'demo/nuclei/image.png'), flag='unchanged')
    for split, part in (('train', np.s_[:, :352]), ('val', np.s_[:, 352:])):
        coco = COCO(str(nuclei / f'coco/annotations/{split}.json'))
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == ['nucleus']
        (info,) = coco.loadImgs(coco.getImgIds())
        stored = mmcv.imread(str(nuclei / f'coco/{split}/{info["file_name"]}'), flag='unchanged')
        assert np.array_equal(stored, image[part])
        union = np.zeros_like(labels[part], dtype=bool)
        for annotation in coco.loadAnns(coco.getAnnIds()):
            mask = coco.annToMask(annotation).astype(bool)
            values = np.unique(labels[part][mask])
            assert len(values) == 1
            assert not (union & mask).any()
            assert annotation['area'] == mask.sum() == (labels[part] == values[0]).sum()
            x, y, w, h = map(int, annotation['bbox'])
            assert mask[y : y + h, x : x + w].sum() == mask.sum()
            union |= mask
        assert union.sum() >= 0.999 * (labels[part] > 0).sum()  # less slivers at the border


def test_nuclei_as_ade20k(nuclei):
    labels = mmcv.imread(str(ROOT / 'demo/nuclei/labels.png'), flag='unchanged')
    for split, part in (('training', np.s_[:, :352]), ('validation', np.s_[:, 352:])):
        semantic = mmcv.imread(
            str(nuclei / f'ade/annotations/{split}/nuclei.png'), flag='unchanged'
        )
        assert np.array_equal(semantic, np.where(labels[part] > 0, 2, 1))
        shape = mmcv.imread(str(nuclei / f'ade/images/{split}/nuclei.png')).shape[:2]
        assert shape == semantic.shape
