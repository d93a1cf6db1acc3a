"""Quantize an exported classifier or segmentor to 8-bit integers, calibrated on images.

    python tools/deployment/quantize.py CONFIG MODEL.onnx SAVE_PATH.onnx [--num-images 32]

ONNX Runtime's static quantization: weights and activations of convolutions and matrix
products become 8-bit, with ranges from the config's training images after its test
pipeline. The file runs in ONNX Runtime and in OpenVINO; tools/deployment/test.py measures
its metric.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from engines import quantize
from lska_mm.cli import (
    add_cfg_options,
    ending,
    make_parser,
    normalize,
    read_config,
    report_errors,
    toolbox,
)
from lska_mm.weights.convert import written_beside


def training_images(cfg: Config, number: int) -> Iterator[np.ndarray]:
    """Yield training images (1, C, H, W) at random, normalized, after the test pipeline."""
    init_default_scope(toolbox(cfg))
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset.dataset
    images = DATASETS.build({**dataset, 'pipeline': cfg.test_dataloader.dataset.pipeline})
    for i in np.random.default_rng(0).permutation(len(images))[:number]:
        yield normalize(images[int(i)]['inputs'][None], cfg).numpy()


@report_errors(OSError, ValueError)
def main() -> None:
    parser = make_parser('Quantize an exported model')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('model', type=Path, help='file written by export_onnx.py')
    parser.add_argument('save_path', type=ending('.onnx'), help='file to write, .onnx')
    parser.add_argument('--num-images', type=int, default=32, help='images for calibration')
    add_cfg_options(parser)
    args = parser.parse_args()
    cfg = read_config(args.config, args.cfg_options)
    if not args.model.is_file():
        raise FileNotFoundError(f'No exported model at {args.model}.')
    if args.save_path.exists() and args.save_path.samefile(args.model):
        raise FileExistsError(f'{args.model} is the file to quantize; choose another output file.')
    with written_beside(args.save_path) as part:
        quantize(args.model, training_images(cfg, args.num_images), part)
    before, after = (path.stat().st_size / 2**20 for path in (args.model, args.save_path))
    print(f'{before:.1f} MiB, now {after:.1f} MiB\nwritten to {args.save_path}')


if __name__ == '__main__':
    sys.exit(main())
