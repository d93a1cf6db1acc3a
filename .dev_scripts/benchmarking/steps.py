"""What the benchmarks time: a step of a model, in PyTorch or in another engine."""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / 'tools/deployment'))
from engines import open_engine, quantize


def make_step(
    model: nn.Module,
    images: torch.Tensor,
    train: bool,
    dtype: torch.dtype | None,
    run: Callable | None = None,
) -> Callable[[], Any]:
    """Make an inference, or a forward and a backward pass.

    Args:
        model: Whose gradients are taken.
        images: (B, 3, H, W).
        train: Whether there is a backward pass.
        dtype: Of automatic mixed precision, if any.
        run: What computes, if not the model itself: it compiled, say.

    Returns:
        A function without arguments; it returns the outputs, or the gradients.
    """
    run = model if run is None else run  # a compiled model has a length, which may fail

    def step() -> Any:
        if train:
            model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(train),
            torch.autocast(images.device.type, dtype, enabled=dtype is not None),
        ):
            out = run(images)
        if not train:
            return out
        out = out[-1] if isinstance(out, tuple) else out
        out.float().sum().backward()
        return [p.grad for p in model.parameters()]

    return step


def make_engine_step(
    engine: str, precision: str, model: nn.Module, images: torch.Tensor
) -> Callable[[], Any]:
    """Make an inference of a model's graph in an engine, by as many threads as PyTorch has.

    Args:
        engine: ``'onnxruntime'`` or ``'openvino'``.
        precision: ``'f32'``, ``'bf16'`` or ``'int8'``, calibrated on ``images``.
        model: What is exported.
        images: (B, 3, H, W).

    Raises:
        RuntimeError: If the engine is not installed.
        ValueError: If it, or the processor, lacks the precision.
    """
    from torch.onnx.utils import export  # the one exporter that torch 2.1 has too

    with TemporaryDirectory() as folder:
        path, quantized = Path(folder, 'model.onnx'), Path(folder, 'quantized.onnx')
        export(model, (images,), str(path), opset_version=17, input_names=['images'])
        if precision == 'int8':
            quantize(path, iter([images.numpy()]), quantized)
            path, precision = quantized, 'f32'
        infer = open_engine(engine, path, precision, torch.get_num_threads())
    inputs = images.numpy()
    return lambda: infer(inputs)
