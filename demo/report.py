"""Show what a model of the demo found, and how it was trained.

    python demo/report.py CONFIG CHECKPOINT --out WORK_DIR

runs the toolbox's inference API on the validation data, draws truth beside
prediction and the training curve into WORK_DIR, and ends with the metrics that
``tools/test.py --work-dir WORK_DIR/test`` measured.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import mmcv
import numpy as np
from mmengine.config import Config

matplotlib.use('Agg')
from matplotlib import pyplot as plt

SCORE = 0.5
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


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --- One picture a task ----------------------------------------------------------


def nuclei_panels(image_file: str, panels: dict, title: str):
    """The image in each panel, under a panel's contours of (mask, colour)."""
    image = mmcv.imread(image_file, flag='grayscale').astype(float)
    shown = np.clip(image / np.percentile(image, 99.5), 0, 1) ** 0.6  # lifts the dim nuclei
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.67 * len(panels), 12), layout='constrained'
    )
    for axis, (name, contours) in zip(axes, panels.items()):
        axis.imshow(shown, cmap='gray', interpolation='nearest')
        for mask, colour in contours:
            axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4)
        axis.set_title(name)
        axis.set_axis_off()
    figure.suptitle(title)
    return figure


def draw_detection(config: Config, checkpoint: str):
    """Image, ground truth and prediction side by side, a colour a nucleus."""
    from mmdet.apis import inference_detector, init_detector
    from pycocotools.coco import COCO

    dataset = config.test_dataloader.dataset
    coco = COCO(str(Path(dataset.data_root, dataset.ann_file)))
    info = coco.loadImgs(coco.getImgIds())[0]
    image_file = str(Path(dataset.data_root, dataset.data_prefix.img, info['file_name']))
    truth = [coco.annToMask(ann) for ann in coco.loadAnns(coco.getAnnIds(info['id']))]

    detector = init_detector(config, checkpoint, device='cpu')
    found = inference_detector(detector, image_file).pred_instances
    masks = found.masks[found.scores >= SCORE].numpy().astype(np.uint8)

    # A prediction wears the colour of the nucleus that it overlaps most.
    palette = plt.get_cmap('hsv')(np.arange(len(truth)) * 0.618 % 1)
    flat_masks = masks.reshape(len(masks), info['height'] * info['width']).astype(float)
    flat_truth = np.stack(truth).reshape(len(truth), -1).astype(float)
    common = flat_masks @ flat_truth.T
    overlap = common / (flat_masks.sum(1)[:, None] + flat_truth.sum(1) - common)
    hit = overlap.max(1) >= 0.5
    colours = np.where(hit[:, None], palette[overlap.argmax(1)], (1, 1, 1, 1))
    panels = {
        'image': (),
        f'ground truth: {len(truth)} nuclei': zip(truth, palette),
        f'prediction: {len(masks)} of score {SCORE} or more': zip(masks, colours),
    }
    return nuclei_panels(
        image_file,
        panels,
        f'Held-back columns: {len(set(overlap.argmax(1)[hit]))} of {len(truth)} nuclei are '
        f'overlapped by IoU 0.5 or more; their predictions wear their colour, {(~hit).sum()} '
        'other (white).',
    )


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
    panels = {
        'image': (),
        'ground truth': [(truth, 'cyan')],
        'prediction': [(found, 'orange')],
        'missed (cyan), too much (red)': [(truth & ~found, 'cyan'), (found & ~truth, 'red')],
    }
    wrong = (truth != found).mean()
    return nuclei_panels(
        str(image_file), panels, f'Held-back columns: {wrong:.1%} of the pixels differ.'
    )


def draw_classification(config: Config, checkpoint: str):
    """Every digit that was mistaken, filled up with others."""
    from mmpretrain import ImageClassificationInferencer

    dataset = config.test_dataloader.dataset
    files = sorted(Path(dataset.data_root, dataset.data_prefix).glob('*/*.png'))
    inferencer = ImageClassificationInferencer(config, checkpoint, device='cpu')
    results = inferencer([str(file) for file in files], batch_size=32)
    cards = [
        (result['pred_class'] == file.parent.name, file, result)
        for file, result in zip(files, results)
    ]
    mistaken = [card for card in cards if not card[0]]
    right = [card for card in cards if card[0]]
    spread = np.linspace(0, len(right) - 1, max(0, 40 - len(mistaken))).astype(int)
    shown = (mistaken + [right[i] for i in spread])[:40]
    figure, axes = plt.subplots(4, 10, figsize=(11, 5.4), layout='constrained')
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (correct, file, result) in zip(axes.flat, shown):
        axis.imshow(mmcv.imread(str(file), flag='grayscale'), cmap='gray_r')
        title = (
            result['pred_class'] if correct else f'{result["pred_class"]}, is {file.parent.name}'
        )
        axis.set_title(
            f'{title}\n{result["pred_score"]:.0%}', fontsize=9, color='black' if correct else 'red'
        )
    figure.suptitle(f'{len(mistaken)} of {len(files)} held-back digits mistaken (red)')
    return figure


DRAW = dict(mmdet=draw_detection, mmseg=draw_segmentation, mmpretrain=draw_classification)


# --- Curve and figures -------------------------------------------------------------


def draw_curve(out: Path, scope: str):
    """Losses and validation metrics over the iterations."""
    log = newest(out, '*/vis_data/scalars.json')
    train: list[dict] = []
    tested: list[tuple[int, dict]] = []
    for record in map(json.loads, log.read_text().splitlines()):
        if 'loss' in record:
            train.append(record)
        else:  # counts epochs: keep iterations
            tested.append((train[-1]['iter'], record))
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for key in [key for key in train[0] if 'loss' in key]:
        losses.plot([r['iter'] for r in train], [r[key] for r in train], label=key)
    losses.set(yscale='log', xlabel='iteration', title='training loss')
    for key, name, _ in METRICS[scope]:
        values = [record[key] for _, record in tested]
        scores.plot([i for i, _ in tested], values, marker='o', label=name)
    scores.set(
        ylim=(0, 1.02 * METRICS[scope][0][2]), xlabel='iteration', title='on the held-back data'
    )
    losses.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))  # beside it
    scores.legend(fontsize='small', loc='lower right')
    for axis in (losses, scores):
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
    prediction = save(DRAW[scope](config, args.checkpoint), args.out / 'prediction.png')
    curve = save(draw_curve(args.out, scope), args.out / 'training_curve.png')
    metrics = json.loads(newest(args.out / 'test', '*/*.json').read_text())
    print()
    for key, name, best in METRICS[scope]:
        print(f'{name}: {metrics[key]:.{3 if best == 1 else 2}f}')
    print(f'truth beside prediction: {prediction}')
    print(f'training curve: {curve}')


if __name__ == '__main__':
    main()
