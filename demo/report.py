"""Show what a model of the demo found, and how it was trained.

    python demo/report.py CONFIG CHECKPOINT --out WORK_DIR

runs the toolbox's inference API on the validation data, draws truth beside
prediction and the training curve into WORK_DIR, and ends with the metrics that
``tools/test.py --work-dir WORK_DIR/test`` measured.
"""

import argparse
import json
from pathlib import Path

import cv2
import matplotlib
import mmcv
import numpy as np
from mmengine.config import Config

matplotlib.use('Agg')
from matplotlib import colors, lines, patches, ticker
from matplotlib import pyplot as plt

SCORE = 0.5  # detections below it are not shown
IOU = 0.5  # of a detection and the nucleus that it found, at least
NEAR = 5  # pixels; nuclei twice as far apart may share a color
STYLES = dict(found='solid', duplicate='dashed', missed='dotted', wrong='dashdot')
# Of each toolbox: metric in its log, name to print, value of a perfect result.
METRICS = dict(
    mmdet=[
        ('coco/bbox_mAP', 'bbox AP', 1),
        ('coco/bbox_mAP_50', 'bbox AP50', 1),
        ('coco/segm_mAP', 'segm AP', 1),
        ('coco/segm_mAP_50', 'segm AP50', 1),
    ],
    mmseg=[('mIoU', 'mIoU', 100), ('aAcc', 'pixel accuracy', 100)],
    mmpretrain=[('accuracy/top1', 'top-1 accuracy', 100)],
)


def newest(folder: Path, pattern: str) -> Path:
    """The last written file of ``pattern`` below ``folder``."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def nuclei_panels(image_file: str, panels: dict, handles: list):
    """The image in each panel, under (mask, color, line of STYLES or another word: filled)."""
    image = mmcv.imread(image_file, flag='grayscale').astype(float)
    shown = np.clip(image / np.percentile(image, 99.5), 0, 1) ** 0.6  # lifts the dim nuclei
    size = (3.6 * len(panels), 12.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout='constrained')
    for axis, (name, areas) in zip(axes, panels.items()):
        axis.imshow(shown, cmap='gray', interpolation='nearest')
        for mask, color, style in areas:
            if style in STYLES:
                axis.contour(mask, [0.5], colors=[color], linestyles=STYLES[style], linewidths=2)
            else:
                axis.imshow(np.multiply.outer(mask, colors.to_rgba(color, 0.7)))
        axis.set_title(name)
        axis.set_axis_off()
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
    return figure


def match(overlap: np.ndarray) -> list[tuple[str, int]]:
    """Match detections as COCO does: the best takes the nucleus that it overlaps most.

    From IoU ``(detections, nuclei)``, detections by falling score, to 'found' or 'duplicate'
    and the nucleus, or 'wrong' and a number beyond those of the nuclei.
    """
    matches: list[tuple[str, int]] = []
    free = np.ones(overlap.shape[1])
    for row, ious in enumerate(overlap):
        if (ious * free).max() >= IOU:
            matches.append(('found', int((ious * free).argmax())))
            free[matches[-1][1]] = 0
        elif ious.max() >= IOU:
            matches.append(('duplicate', int(ious.argmax())))
        else:
            matches.append(('wrong', len(free) + row))
    return matches


def color_apart(masks: np.ndarray) -> np.ndarray:
    """Colors for masks ``(N, H, W)``; those within ``2 * NEAR`` pixels never share one."""
    window = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
    grown = np.stack([cv2.dilate(mask, window).ravel() for mask in masks]).astype(float)
    near = grown @ grown.T > 0
    count = max(6, near.sum(1).max())  # more than a mask has neighbors: one is always free
    chosen: list[int] = []
    for row in near:
        free = set(range(count)) - {chosen[i] for i in np.flatnonzero(row[: len(chosen)])}
        chosen.append(min(free, key=chosen.count))  # the least used
    return 0.3 + 0.7 * plt.get_cmap('hsv')(np.array(chosen) / count)  # pure blue is dim


def detection_figure(image_file: str, truth: np.ndarray, masks: np.ndarray):
    """Draw masks of nuclei ``(N, H, W)`` beside those of detections, by falling score."""
    common = np.einsum('dhw,nhw->dn', masks, truth, dtype=float)
    areas = masks.sum((1, 2))[:, None] + truth.sum((1, 2))
    matches = match(common / (areas - common))
    kinds, owners = [kind for kind, _ in matches], [owner for _, owner in matches]
    regions = np.concatenate([truth, np.zeros_like(masks)])
    for owner, mask in zip(owners, masks):  # a nucleus and its detections share a color
        regions[owner] |= mask
    palette = color_apart(regions)
    fates = ['found' if nucleus in owners else 'missed' for nucleus in range(len(truth))]
    found, duplicate, wrong = map(kinds.count, ('found', 'duplicate', 'wrong'))
    known = f'= {found} found (IoU {IOU} or more) + {fates.count("missed")} missed'
    shown = f'= {found} found + {duplicate} duplicate + {wrong} wrong'
    panels = {
        'image: the held-out columns\n': [],
        f'ground truth: {len(truth)} nuclei\n{known}': zip(truth, palette, fates),
        f'prediction: {len(masks)} of score {SCORE} or more\n{shown}': zip(
            masks, palette[owners], kinds
        ),
    }
    handles = [lines.Line2D([], [], color='k', ls=STYLES[kind], label=kind) for kind in STYLES]
    return nuclei_panels(image_file, panels, handles)


def draw_detection(config: Config, checkpoint: str):
    """Image, ground truth and prediction side by side, neighbors in different colors."""
    from mmdet.apis import inference_detector, init_detector
    from pycocotools.coco import COCO

    dataset = config.test_dataloader.dataset
    coco = COCO(str(Path(dataset.data_root, dataset.ann_file)))
    info = coco.loadImgs(coco.getImgIds())[0]
    image_file = str(Path(dataset.data_root, dataset.data_prefix.img, info['file_name']))
    truth = np.stack([coco.annToMask(ann) for ann in coco.loadAnns(coco.getAnnIds(info['id']))])
    detector = init_detector(config, checkpoint, device='cpu')
    found = inference_detector(detector, image_file).pred_instances
    masks = found.masks[found.scores >= SCORE].numpy().astype(np.uint8)
    return detection_figure(image_file, truth, masks)


def segmentation_figure(image_file: str, truth: np.ndarray, found: np.ndarray):
    """Draw two masks ``(H, W)`` and the pixels where they differ."""
    missed = (truth & ~found, 'deepskyblue', 'too little')
    extra = (found & ~truth, 'red', 'too much')
    wrong = (truth != found).sum()
    panels = {
        'image: the held-out columns': [],
        'ground truth': [(truth, 'cyan', 'found')],
        'prediction': [(found, 'yellow', 'found')],
        f'{wrong:,} pixels ({wrong / truth.size:.1%}) differ': [missed, extra],
    }
    handles = [
        patches.Patch(color=color, label=f'{name}: {mask.sum():,} pixels')
        for mask, color, name in (missed, extra)
    ]
    return nuclei_panels(image_file, panels, handles)


def draw_segmentation(config: Config, checkpoint: str):
    """Image, ground truth, prediction, and the pixels where they differ."""
    from mmseg.apis import inference_model, init_model

    dataset = config.test_dataloader.dataset
    root, prefix = Path(dataset.data_root), dataset.data_prefix
    image_file = next((root / prefix.img_path).glob('*.png'))
    labels = mmcv.imread(str(root / prefix.seg_map_path / image_file.name), flag='unchanged')
    truth = labels == 2  # ADE20K counts from 1: background, nucleus
    segmentor = init_model(config, checkpoint, device='cpu')
    found = inference_model(segmentor, str(image_file)).pred_sem_seg.data[0].numpy() == 1
    return segmentation_figure(str(image_file), truth, found)


def draw_classification(config: Config, checkpoint: str):
    """Every digit that was mistaken, filled up with others."""
    from mmpretrain import ImageClassificationInferencer

    dataset = config.test_dataloader.dataset
    files = sorted(Path(dataset.data_root, dataset.data_prefix).glob('*/*.png'))
    inferencer = ImageClassificationInferencer(config, checkpoint, device='cpu')
    results = inferencer([str(file) for file in files], batch_size=32)
    cards = [(r['pred_class'], f.parent.name, r['pred_score'], f) for f, r in zip(files, results)]
    mistaken = [card for card in cards if card[0] != card[1]]
    right = [card for card in cards if card[0] == card[1]]
    spread = np.linspace(0, len(right) - 1, max(0, 40 - len(mistaken))).astype(int)
    figure, axes = plt.subplots(4, 10, figsize=(11, 5.4), layout='constrained')
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (found, label, score, file) in zip(axes.flat, mistaken + [right[i] for i in spread]):
        axis.imshow(mmcv.imread(str(file), flag='grayscale'), cmap='gray_r')
        name, color = (found, 'k') if found == label else (f'{found}, is {label}', 'red')
        axis.set_title(f'{name}\n{score:.0%}', fontsize=9, color=color)
    figure.suptitle(f'{len(mistaken)} of {len(files)} held-out digits mistaken (red)')
    return figure


DRAW = dict(mmdet=draw_detection, mmseg=draw_segmentation, mmpretrain=draw_classification)


def draw_curve(out: Path, scope: str):
    """Losses and validation metrics over the iterations."""
    log = newest(out, '*/vis_data/scalars.json').read_text()
    train: list[dict] = []
    tested: list[dict] = []
    for record in map(json.loads, log.splitlines()):
        if 'loss' in record:
            train.append(record)
        else:  # counts epochs: keep iterations
            tested.append(record | dict(iter=train[-1]['iter']))
    figure, axes = plt.subplots(1, 2, sharex=True, figsize=(11, 4), layout='constrained')
    losses, scores = axes
    steps = [record['iter'] for record in train]
    losses.plot(steps, [record['loss'] for record in train], 'k.-', label='loss')
    parts = [key for key in train[0] if 'loss' in key and key != 'loss']
    for key in parts if len(parts) > 1 else []:  # a single part is the sum
        losses.plot(steps, [record[key] for record in train], '.-', label=key)
    losses.set(yscale='log', title='training loss')
    losses.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    losses.yaxis.set_major_formatter('{x:g}')
    losses.minorticks_off()
    for key, name, _ in METRICS[scope]:
        scores.plot([r['iter'] for r in tested], [r[key] for r in tested], 'o-', label=name)
    best = METRICS[scope][0][2]
    scores.set(ylim=(-0.03 * best, 1.03 * best), title='on the held-out data')
    for axis in axes:
        axis.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))  # beside it
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw and sum up a demo')
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='work dir of the training')
    args = parser.parse_args()

    config = Config.fromfile(args.config)
    scope = config.default_scope
    prediction, curve = args.out / 'prediction.png', args.out / 'training_curve.png'
    DRAW[scope](config, args.checkpoint).savefig(prediction, dpi=110)
    draw_curve(args.out, scope).savefig(curve, dpi=110)
    metrics = json.loads(newest(args.out / 'test', '*/*.json').read_text())
    print()
    for key, name, best in METRICS[scope]:
        print(f'{name}: {metrics[key]:.{3 if best == 1 else 2}f}')
    print(f'truth beside prediction: {prediction}')
    print(f'training curve: {curve}')


if __name__ == '__main__':
    main()
