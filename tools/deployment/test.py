"""Test an exported classifier or segmentor in an engine, as tools/test.py tests it in PyTorch.

    python tools/deployment/test.py CONFIG MODEL.onnx [--engine openvino] [--precision bf16]

The config's own data, loop and metrics; only what computes the logits is the engine.
"""

import argparse
import sys
from pathlib import Path

import onnx
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from engines import ENGINES, Inference, open_engine
from lska_mm.cli import base_parser, build_runner, load_config, report_errors


def run_in_engine(runner: Runner, infer: Inference) -> None:
    """Replace what computes the logits of the Runner's model.

    Raises:
        ValueError: If the model is neither a classifier nor a segmentor.
    """

    def logits(images: Tensor, *more) -> Tensor:
        return torch.from_numpy(infer(images.cpu().numpy())[0]).to(images.device)

    model = runner.model
    if hasattr(model, 'encode_decode'):
        model.encode_decode = logits
    elif hasattr(model, 'head') and hasattr(model.head, 'predict'):
        model.extract_feat = lambda images, *more, **how: images
        model.head.forward = logits
    else:
        raise ValueError(f'{type(model).__name__} is neither a classifier nor a segmentor.')


def load(args: argparse.Namespace) -> Config:
    """Read the config, for a test that needs no weights."""
    cfg = load_config(args, persistent_workers=True)
    cfg.update(load_from=None, resume=False)
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    return cfg


@report_errors(OSError, RuntimeError, ValueError)
def main() -> None:
    parser = base_parser('Test an exported model')
    parser.add_argument('model', type=Path, help='what export_onnx.py or quantize.py wrote')
    parser.add_argument('--engine', choices=ENGINES, default='onnxruntime')
    parser.add_argument('--precision', choices=['f32', 'bf16'], default='f32',
                        help='of OpenVINO; 8-bit files are so in both')  # fmt: skip
    args = parser.parse_args()
    infer = open_engine(args.engine, args.model, args.precision)
    outputs = [output.name for output in onnx.load(args.model).graph.output]
    if outputs != ['logits']:
        raise ValueError(f'{args.model} gives {", ".join(outputs)}, not logits alone.')
    runner = build_runner(load(args))
    run_in_engine(runner, infer)
    runner.test()


if __name__ == '__main__':
    sys.exit(main())
