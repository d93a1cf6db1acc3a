"""What the pictures of the demos say: counts that add up, neighbors that can be told apart."""

import json
import re
from collections import Counter

import cv2
import numpy as np
import pytest
from matplotlib import pyplot as plt
from mmengine.config import Config
from pycocotools.coco import COCO

from conftest import ROOT, load_tool

report = load_tool('demo/report.py')


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def annotated(nuclei, split):
    """The image's file and the masks of the nuclei annotated in it."""
    coco = COCO(str(nuclei / f'coco/annotations/{split}.json'))
    masks = np.stack([coco.annToMask(annotation) for annotation in coco.anns.values()])
    return str(nuclei / f'coco/{split}/nuclei.png'), masks


def outlines(axis):
    """Color and line style of each outline of a panel."""
    return [(tuple(line.get_edgecolor()[0]), line.linestyles) for line in axis.collections]


def numbers(title):
    """Numbers of a panel's title by the word that follows them."""
    return {word: int(number) for number, word in re.findall(r'[:=+] (\d+) ([a-z]+)', title)}


# --- Detection --------------------------------------------------------------------


@pytest.mark.parametrize('split', ['train', 'val'])
def test_neighbors_differ_in_color(split, nuclei):
    _, masks = annotated(nuclei, split)
    colors = report.color_apart(masks)
    points = [np.argwhere(mask - cv2.erode(mask, np.ones((3, 3)))) for mask in masks]
    close = 0
    for i, j in zip(*np.triu_indices(len(masks), 1)):
        if np.abs(points[i][:, None] - points[j]).max(-1).min() <= 2 * report.NEAR:
            close += 1
            assert np.abs(colors[i] - colors[j]).max() > 0.5
    assert close > 10


def test_many_neighbors_have_as_many_colors():
    masks = np.zeros((9, 40, 40), np.uint8)
    for i, mask in enumerate(masks):  # all overlap in rows 23
        mask[15 + i : 24 + i, 10:30] = 1
    assert len(np.unique(report.color_apart(masks), axis=0)) == 9


def test_detections_are_matched_as_coco_does():
    overlap = np.array(
        [
            [0.7, 0.0, 0.0],  # takes nucleus 0, as it has the highest score
            [0.9, 0.0, 0.0],
            [0.6, 0.5, 0.0],  # nucleus 1 is still free
            [0.0, 0.2, 0.4],
        ]
    )
    assert report.match(overlap) == [('found', 0), ('duplicate', 0), ('found', 1), ('wrong', 6)]


def test_the_picture_of_detection_adds_up(nuclei):
    image, truth = annotated(nuclei, 'val')
    doubles = [cv2.erode(mask, np.ones((3, 3))) for mask in truth[10:13]]
    merged = truth[5] | truth[20]
    masks = np.stack([*truth[4:], *doubles, np.roll(merged, 40, axis=1)])
    _, known, found = report.detection_figure(image, truth, masks).axes

    assert numbers(known.get_title()) == dict(nuclei=35, found=31, missed=4)
    assert numbers(found.get_title()) == dict(of=35, found=31, duplicate=3, wrong=1)
    known, found = outlines(known), outlines(found)
    assert Counter(style for _, style in known) == dict(solid=31, dotted=4)
    assert Counter(style for _, style in found) == dict(solid=31, dashed=3, dashdot=1)
    assert known[4:] == found[:31]
    assert [color for color, _ in found[31:34]] == [color for color, _ in known[10:13]]


def test_a_detector_that_finds_nothing(nuclei):
    image, truth = annotated(nuclei, 'val')
    _, known, found = report.detection_figure(image, truth, truth[:0]).axes
    assert numbers(known.get_title()) == dict(nuclei=35, found=0, missed=35)
    assert numbers(found.get_title()) == dict(of=0, found=0, duplicate=0, wrong=0)


def test_nms_leaves_no_doubles_and_no_nucleus_out(nuclei):
    """The overlap above which boxes are one nucleus is above that of two in the training data."""
    from mmdet.structures.bbox import bbox_overlaps
    from torch import tensor

    config = Config.fromfile(ROOT / 'demo/mask-rcnn_lska-van-tiny_fpn_nuclei.py')
    annotations = json.loads((nuclei / 'coco/annotations/train.json').read_text())['annotations']
    boxes = tensor([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in annotations)])
    overlap = bbox_overlaps(boxes, boxes).fill_diagonal_(0).max()
    assert 0.25 < overlap < config.model.test_cfg.rcnn.nms.iou_threshold < 0.35


# --- Segmentation -------------------------------------------------------------------


def test_differences_are_filled_and_counted(nuclei):
    image, truth = annotated(nuclei, 'val')
    truth = truth.any(0)
    found = np.roll(truth, 3, axis=1)
    figure = report.segmentation_figure(image, truth, found)
    *_, differences = figure.axes
    _, missed, extra = (shown.get_array() for shown in differences.images)
    for shown, mask in ((missed, truth & ~found), (extra, found & ~truth)):
        assert ((shown[..., 3] > 0) == mask).all()
        assert shown[..., 3].max() == 0.7  # translucent
    little, much = (
        int(re.search(r'([\d,]+) pixels', text.get_text())[1].replace(',', ''))
        for text in figure.legends[0].get_texts()
    )
    assert (little, much) == ((truth & ~found).sum(), (found & ~truth).sum())
    assert differences.get_title().startswith(f'{little + much:,} pixels (')


# --- Curves -----------------------------------------------------------------------


def curve(folder, records, scope):
    log = folder / 'run/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, records)))
    return report.draw_curve(folder, scope).axes


def test_no_curve_hides_another(tmp_path):
    """A sum of one loss is that loss; results of 0 and of 100 are not on the frame."""
    records = [dict(loss=0.6 / i, **{'decode.loss_ce': 0.6 / i}, iter=i) for i in (1, 2, 3)]
    records.append(dict(mIoU=0.0, aAcc=100.0, step=3))
    losses, scores = curve(tmp_path, records, 'mmseg')
    assert [line.get_label() for line in losses.lines] == ['loss']
    bottom, top = scores.get_ylim()
    assert bottom < 0
    assert top > 100
    assert [list(line.get_xdata()) for line in scores.lines] == [[3], [3]]


def test_each_part_of_a_loss_is_drawn(tmp_path):
    records = [dict(loss=3 / i, loss_cls=2 / i, loss_mask=1 / i, iter=i) for i in (1, 20)]
    metrics = {key: 0.5 for key, *_ in report.METRICS['mmdet']}
    losses, _ = curve(tmp_path, [*records, metrics], 'mmdet')
    assert [line.get_label() for line in losses.lines] == ['loss', 'loss_cls', 'loss_mask']
    losses.figure.canvas.draw()
    shown = [label.get_text() for label in losses.get_yticklabels()]
    assert {'0.1', '0.5', '1', '2'} <= set(shown)  # not 10^-1
