"""Test an exported classifier or segmentor in an engine, like tools/test.py in PyTorch.

    python tools/deployment/test.py CONFIG MODEL.onnx [--engine openvino] [--precision bf16]

It uses the config's own data, loop and metrics; only the logits come from the engine.
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


def run_in_engine(runner: Runner, infer: Inference, shape: list[int]) -> None:
    """Let an engine compute the logits of the Runner's model.

    Args:
        runner: The config's Runner.
        infer: Returns the logits of a batch.
        shape: Shape of the logits, 0 where it varies.

    Raises:
        ValueError: If the model is neither a classifier nor a segmentor, or has other logits.
    """

    def logits(images: Tensor, *more) -> Tensor:
        return torch.from_numpy(infer(images.cpu().numpy())[0]).to(images.device)

    model = runner.model
    if hasattr(model, 'encode_decode'):
        model.encode_decode = logits
        expected = [0, model.out_channels, 0, 0]
    elif hasattr(model, 'head') and hasattr(model.head, 'predict'):
        model.extract_feat = lambda images, *more, **how: images
        model.head.forward = logits
        expected = [0, getattr(model.head, 'num_classes', shape[-1])]
    else:
        raise ValueError(f'{type(model).__name__} is neither a classifier nor a segmentor.')
    if len(shape) != len(expected) or shape[1] not in (0, expected[1]):
        raise ValueError(
            f"The exported model gives logits of {shape}, the config's {type(model).__name__} of "
            f'{expected} (0: any).'
        )


def load(args: argparse.Namespace) -> Config:
    """Read the config for a test without PyTorch weights."""
    cfg = load_config(args, persistent_workers=True)
    cfg.update(load_from=None, resume=False)
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    return cfg


@report_errors(OSError, RuntimeError, ValueError)
def main() -> None:
    parser = base_parser('Test an exported model')
    parser.add_argument('model', type=Path, help='file written by export_onnx.py or quantize.py')
    parser.add_argument('--engine', choices=ENGINES, default='onnxruntime')
    parser.add_argument('--precision', choices=['f32', 'bf16'], default='f32',
                        help='for OpenVINO; 8-bit files run in 8 bits anyway')  # fmt: skip
    args = parser.parse_args()
    infer = open_engine(args.engine, args.model, args.precision)
    outputs = {output.name: output for output in onnx.load(args.model).graph.output}
    if list(outputs) != ['logits']:
        raise ValueError(f'{args.model} has the outputs {", ".join(outputs)}, expected logits.')
    shape = [size.dim_value for size in outputs['logits'].type.tensor_type.shape.dim]
    runner = build_runner(load(args))
    run_in_engine(runner, infer, shape)
    runner.test()


if __name__ == '__main__':
    sys.exit(main())
