"""What the benchmarks time: a step of a model, in PyTorch or in another engine."""

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


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
    run = run or model

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


def to_onnx(model: nn.Module, image: torch.Tensor) -> io.BytesIO:
    """The graph of a model."""
    from torch.onnx.utils import export

    file = io.BytesIO()
    export(model, (image,), file, opset_version=17, input_names=['images'])
    return io.BytesIO(file.getvalue())


def make_onnx_step(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """An inference in ONNX Runtime, by as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.force_spinning_stop', '1')  # leave the next its CPU
    session = onnxruntime.InferenceSession(
        to_onnx(model, image).getvalue(), options, providers=['CPUExecutionProvider']
    )
    inputs = dict(images=image.numpy())
    return lambda: session.run(None, inputs)


def make_openvino_step(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """An inference in OpenVINO, by as many threads as PyTorch has, in float32."""
    import openvino

    how = dict(INFERENCE_NUM_THREADS=torch.get_num_threads(), INFERENCE_PRECISION_HINT='f32')
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(to_onnx(model, image)), 'CPU', how)
    request = compiled.create_infer_request()
    inputs = [image.numpy()]
    return lambda: request.infer(inputs)
