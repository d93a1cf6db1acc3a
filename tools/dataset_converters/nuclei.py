"""Write the embedded microscopy image as COCO and as ADE20K-style data sets.

    python tools/dataset_converters/nuclei.py [SRC] [--out data/nuclei]

writes, from the image and label map in SRC (demo/nuclei),

    OUT/coco/annotations/{train,val}.json      OUT/coco/{train,val}/*.png
    OUT/ade/annotations/{training,validation}  OUT/ade/images/{training,validation}

or the --formats chosen: coco, which needs pycocotools; ade; or bands, like ade but in
OUT/bands, with four bands per image: itself, and blurred by 1, 2 and 4 pixels.
The first 11/16 of the columns are for training, the others for validation: no
pixel is in both. A nucleus on the border is split between the two.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np

from lska_mm.cli import make_parser, read_image, report_errors
from lska_mm.weights.convert import written_beside

FORMATS = ['coco', 'ade', 'bands']
BLURS = (1, 2, 4)  # pixels
MIN_AREA = 10  # pixels; smaller pieces of a nucleus on the border are dropped
ADE_SPLITS = dict(train='training', val='validation')
# ADE20K counts classes from 1; 0 means unlabeled.
ADE_BACKGROUND, ADE_NUCLEUS = 1, 2


def coco_annotations(labels: np.ndarray, image_id: int) -> list[dict]:
    """Return a COCO annotation for each nonzero value of a label map (H, W)."""
    from pycocotools import mask as coco_mask

    annotations = []
    for value in np.unique(labels[labels > 0]):
        mask = labels == value
        if mask.sum() < MIN_AREA:
            continue
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append(
            dict(
                id=len(annotations) + 1,
                image_id=image_id,
                category_id=1,
                iscrowd=0,
                area=int(mask.sum()),
                bbox=coco_mask.toBbox(rle).tolist(),
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
            )
        )
    return annotations


def png(image: np.ndarray) -> bytes:
    """Encode an image (H, W), or of four bands (H, W, 4)."""
    return cv2.imencode('.png', image)[1].tobytes()


def write(data: bytes, path: Path) -> None:
    """Write a file at once, since another process may be reading it."""
    with written_beside(path) as part:
        part.write_bytes(data)


def convert(source: Path, out: Path, formats: Sequence[str]) -> None:
    """Write data sets to ``out`` from ``source``/{image,labels}.png.

    Raises:
        OSError: If one of the two files is missing, or is not an image.
        ValueError: If they differ in size, or a part has no nucleus.
    """
    arrays = {}
    for name in ('image.png', 'labels.png'):
        read_image(source / name)  # raises an error that names it
        arrays[name] = mmcv.imread(str(source / name), flag='unchanged')
    image, labels = arrays['image.png'], arrays['labels.png']
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f'{source}: image.png is {image.shape[:2]}, labels.png {labels.shape}; '
            'expected a label map of the size of the image.'
        )

    border = image.shape[1] * 11 // 16
    columns = dict(train=slice(0, border), val=slice(border, image.shape[1]))
    for image_id, (split, part) in enumerate(columns.items(), start=1):
        tile, tile_labels = image[:, part], labels[:, part]
        _, areas = np.unique(tile_labels[tile_labels > 0], return_counts=True)
        nuclei = int((areas >= MIN_AREA).sum())
        if not nuclei:
            raise ValueError(
                f'{source}: columns {part.start} to {part.stop - 1}, for {split}, have no nucleus.'
            )
        height, width = tile.shape[:2]
        if 'coco' in formats:
            data = dict(
                images=[dict(id=image_id, file_name='nuclei.png', height=height, width=width)],
                categories=[dict(id=1, name='nucleus')],
                annotations=coco_annotations(tile_labels, image_id),
            )
            write(png(tile), out / f'coco/{split}/nuclei.png')
            write(json.dumps(data).encode(), out / f'coco/annotations/{split}.json')
        semantic = np.where(tile_labels > 0, ADE_NUCLEUS, ADE_BACKGROUND).astype(np.uint8)
        blurred = [cv2.GaussianBlur(tile, (0, 0), sigma) for sigma in BLURS]
        images = dict(ade=tile, bands=np.dstack([tile, *blurred]))
        for kind in images.keys() & set(formats):
            write(png(images[kind]), out / f'{kind}/images/{ADE_SPLITS[split]}/nuclei.png')
            write(png(semantic), out / f'{kind}/annotations/{ADE_SPLITS[split]}/nuclei.png')
        print(f'{split}: {width} x {height} pixels, {nuclei} nuclei')
    print(f'written to {out}')


@report_errors(ImportError, OSError, ValueError)
def main() -> None:
    parser = make_parser('Convert the embedded nuclei image')
    embedded = Path(__file__).parents[2] / 'demo/nuclei'
    parser.add_argument(
        'src', nargs='?', type=Path, default=embedded, help='folder with image.png and labels.png'
    )
    parser.add_argument('--out', type=Path, default=Path('data/nuclei'), help='output folder')
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=FORMATS[:2])
    args = parser.parse_args()
    convert(args.src, args.out, args.formats)


if __name__ == '__main__':
    sys.exit(main())
