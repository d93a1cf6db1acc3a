"""Engines that run exported files on a CPU, and quantization to 8 bits."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Inference = Callable[[np.ndarray], list[np.ndarray]]


def open_onnxruntime(path: Path, precision: str, threads: int) -> Inference:
    """Open a file in ONNX Runtime."""
    import onnxruntime

    if precision != 'f32':
        raise ValueError(f'ONNX Runtime computes in f32 on a CPU, not in {precision}.')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.force_spinning_stop', '1')  # leaves others the CPU
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def open_openvino(path: Path, precision: str, threads: int) -> Inference:
    """Open a file in OpenVINO."""
    import openvino

    core = openvino.Core()
    able = core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
    if precision != 'f32' and precision.upper() not in able:
        raise ValueError(f'This processor does not compute in {precision}.')
    how = dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=precision)
    request = core.compile_model(path, 'CPU', how).create_infer_request()
    return lambda images: list(request.infer([images]).values())


ENGINES = dict(onnxruntime=open_onnxruntime, openvino=open_openvino)
INSTALLED = [name for name in ENGINES if find_spec(name)]


def open_engine(name: str, path: Path, precision: str = 'f32', threads: int = 0) -> Inference:
    """Open an exported file.

    Args:
        name: Name of the engine.
        path: The file.
        precision: ``'f32'`` or ``'bf16'``, for what is float32 in the file.
        threads: Number of threads; 0 lets the engine choose.

    Returns:
        A function from images (B, C, H, W) to the outputs; raises a RuntimeError if the
        graph does not take them.

    Raises:
        OSError: If there is no such file.
        RuntimeError: If the engine is not installed, or cannot read the file.
        ValueError: If it does not compute in ``precision``.
    """
    if name not in INSTALLED:
        raise RuntimeError(f'{name} is not installed: pip install {name}')
    if not path.is_file():
        raise FileNotFoundError(f'No exported model at {path}.')
    try:
        run = ENGINES[name](path, precision, threads)
    except ValueError:
        raise
    except Exception as error:  # each engine has its own
        raise RuntimeError(f'{name} cannot open {path}: {str(error).splitlines()[0]}') from None

    def infer(images: np.ndarray) -> list[np.ndarray]:
        try:
            return run(images)
        except Exception as error:
            line = str(error).splitlines()[0]
            raise RuntimeError(f'{path} does not take {images.shape}: {line}') from None

    return infer


def quantize(source: Path, images: Iterator[np.ndarray], target: Path) -> None:
    """Quantize weights and activations of convolutions and matrix products to 8 bits.

    Args:
        source: An exported file in float32.
        images: (B, C, H, W), to calibrate the ranges of the activations.
        target: File to write.

    Raises:
        ValueError: If ``source`` is not an exported file, is quantized already, or does not
            take the images.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnxruntime import quantization
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        proto = onnx.load(source)
        name = proto.graph.input[0].name
    except (DecodeError, IndexError):
        raise ValueError(f'{source} is not an ONNX file.') from None
    if any(node.op_type == 'QuantizeLinear' for node in proto.graph.node):
        raise ValueError(f'{source} is quantized already.')

    inputs = ({name: image} for image in images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, 'prepared.onnx')
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        logging.disable(logging.WARNING)  # it advises what was just done
        try:
            quantization.quantize_static(
                prepared, target, Reader(),
                quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            )  # fmt: skip
        except InvalidArgument as error:
            line = str(error).splitlines()[0]
            raise ValueError(f'{source} does not take the images: {line}') from None
        finally:
            logging.disable(logging.NOTSET)
    written = onnx.load(target)
    written.metadata_props.extend(proto.metadata_props)
    onnx.save(written, target)
