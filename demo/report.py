"""Show what a detector trained on the nuclei found, and how it was trained.

    python demo/report.py CONFIG CHECKPOINT --out WORK_DIR

runs mmdet's inference API on the validation part, draws ground truth beside
prediction and the training curve into WORK_DIR, and ends with the APs that
``tools/test.py --work-dir WORK_DIR/test`` measured.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import mmcv
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from pycocotools.coco import COCO

matplotlib.use('Agg')
from matplotlib import pyplot as plt

SCORE = 0.5


def newest(folder: Path, pattern: str) -> Path:
    """The last written file of ``pattern`` below ``folder``."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def draw_contours(axis, masks, colours) -> None:
    for mask, colour in zip(masks, colours):
        axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4)


def draw_prediction(config: Config, checkpoint: str, out: Path) -> Path:
    """Image, ground truth and prediction side by side, a colour a nucleus."""
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
    flat = [np.stack(group).reshape(len(group), -1).astype(float) for group in (masks, truth)]
    common = flat[0] @ flat[1].T
    overlap = common / (flat[0].sum(1)[:, None] + flat[1].sum(1) - common)
    hit = overlap.max(1) >= 0.5
    colours = np.where(hit[:, None], palette[overlap.argmax(1)], (1, 1, 1, 1))

    image = mmcv.imread(image_file, flag='grayscale').astype(float)
    shown = np.clip(image / np.percentile(image, 99.5), 0, 1) ** 0.6  # lifts the dim nuclei
    panels = {
        'image': ((), ()),
        f'ground truth: {len(truth)} nuclei': (truth, palette),
        f'prediction: {len(masks)} of score {SCORE} or more': (masks, colours),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 12), layout='constrained')
    for axis, (title, (contours, contour_colours)) in zip(axes, panels.items()):
        axis.imshow(shown, cmap='gray', interpolation='nearest')
        draw_contours(axis, contours, contour_colours)
        axis.set_title(title)
        axis.set_axis_off()
    figure.suptitle(
        f'Held-back columns: {hit.sum()} of {len(masks)} predictions overlap a nucleus '
        'by IoU 0.5 or more and wear its colour; others would be white.'
    )
    path = out / 'prediction.png'
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_curve(out: Path) -> Path:
    """Losses and validation APs over the iterations."""
    log = newest(out, '*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    train = [record for record in records if 'loss' in record]
    last, epoch_ends = 0, []
    for record in records:  # validation records count epochs: keep iterations
        if 'loss' in record:
            last = record['iter']
        else:
            epoch_ends.append((last, record))
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for key in ('loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'):
        losses.plot([r['iter'] for r in train], [r[key] for r in train], label=key)
    losses.set(yscale='log', xlabel='iteration', title='training loss')
    for key in ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'):
        scores.plot(
            [i for i, _ in epoch_ends],
            [r[f'coco/{key}'] for _, r in epoch_ends],
            marker='o',
            label=key,
        )
    scores.set(ylim=(0, 1), xlabel='iteration', title='AP on the held-back columns')
    for axis in (losses, scores):
        axis.legend(fontsize='small')
        axis.grid(alpha=0.3)
    path = out / 'training_curve.png'
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw and sum up the nuclei demo')
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='work dir of the training')
    args = parser.parse_args()

    prediction = draw_prediction(Config.fromfile(args.config), args.checkpoint, args.out)
    curve = draw_curve(args.out)
    metrics = json.loads(newest(args.out / 'test', '*/*.json').read_text())
    print()
    for task in ('bbox', 'segm'):
        print(
            f'{task}  AP {metrics[f"coco/{task}_mAP"]:.3f}  '
            f'AP50 {metrics[f"coco/{task}_mAP_50"]:.3f}'
        )
    print(f'ground truth beside prediction: {prediction}')
    print(f'training curve: {curve}')


if __name__ == '__main__':
    main()
