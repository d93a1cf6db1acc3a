"""Export a trained LSKA-VAN to ONNX, and compare it with PyTorch in the engines installed.

    python tools/deployment/export_onnx.py CONFIG CHECKPOINT SAVE_PATH.onnx [--backbone]

The graph takes `images` (B, 3, H, W) of any B, H and W, normalized as the
file's metadata say, and gives

    logits              (B, classes) of a classifier,
    logits              (B, classes, H, W) of a segmentor,
    stage1, stage2, ... with --backbone, of any model: the backbone's maps.

Detectors go by way of MMDeploy, on the original stack: the graph takes `input` and
gives `dets`, `labels` and, where the model has them, `masks`; the detections in
--image are compared.

BatchNorms and layer scales are folded (`switch_to_deploy`). The file is
written only if its outputs equal PyTorch's, without --static at another size than
the traced one too.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.onnx.utils import export as trace_to_onnx  # the one exporter that torch 2.1 has too

from engines import INSTALLED, open_engine
from lska_mm.cli import (
    add_cfg_options,
    ending,
    load_file,
    make_parser,
    normalize,
    read_config,
    read_image,
    report_errors,
    size,
    toolbox,
)
from lska_mm.weights.convert import written_beside
from lska_mm.weights.names import CheckpointError

try:
    import onnx
    import onnxruntime  # noqa: F401  nothing is written before it was compared
except ImportError as error:
    sys.exit(f'export_onnx.py: {error}: pip install onnx onnxruntime')

TOLERANCE = 1e-4  # largest difference, relative to the largest output


class AdaptiveAvgPool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as matrix products, which ONNX has for any size."""

    def __init__(self, cells: tuple[int, int]):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """Means (B, C, *cells) of the maps (B, C, H, W)."""
        rows, columns = (self._means(n, size, x) for n, size in zip(self.cells, x.shape[2:]))
        return rows @ x @ columns.T

    @staticmethod
    def _means(cells: int, size: int, x: Tensor) -> Tensor:
        """Rows that average a cell each: i * size / cells up to (i + 1) * size / cells."""
        i = torch.arange(cells, device=x.device)[:, None]
        pixel = torch.arange(size, device=x.device)[None]
        inside = ((pixel + 1) * cells > i * size) & (pixel * cells < (i + 1) * size)
        return inside.to(x.dtype) / inside.sum(1, keepdim=True)


class Graph(nn.Module):
    """What is exported of a model: images to one or several maps or logits."""

    def __init__(self, model: nn.Module, backbone: bool):
        super().__init__()
        self.model = model
        self.backbone = backbone
        for module in list(model.modules()):
            for name, child in module.named_children():
                setattr(module, name, for_any_size(child))

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns."""
        if self.backbone:
            return [f'stage{i + 1}' for i in self.model.backbone.out_indices]
        return ['logits']

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.backbone:
            return self.model.backbone(images)
        if hasattr(self.model, 'encode_decode'):
            return (self.model.encode_decode(images, [dict(img_shape=images.shape[2:])]),)
        return (self.model(images, mode='tensor'),)


def for_any_size(module: nn.Module) -> nn.Module:
    """The module, or another that does the same and whose graph is not of one size."""
    if isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) != (1, 1):
        return AdaptiveAvgPool(_pair(module.output_size))
    if type(module).__module__.startswith('mmseg.') and type(module).__name__ == 'Upsample':
        # It computes its output's size in Python.
        return nn.Upsample(module.size, module.scale_factor, module.mode, module.align_corners)
    return module


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def add_metadata(path: Path, cfg: Config) -> None:
    """Add what a user needs to prepare images to a file, each as JSON."""
    norm = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    rgb = norm.get('bgr_to_rgb') or norm.get('to_rgb')
    known = dict(mean=norm.get('mean'), std=norm.get('std'), channels='RGB' if rgb else 'BGR')
    proto = onnx.load(path)
    onnx.helper.set_model_props(
        proto, {key: json.dumps(value) for key, value in known.items() if value is not None}
    )
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def run(
    cfg: Config, model: nn.Module, path: Path, images: Tensor, backbone: bool, static: bool,
    opset: int,
) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:  # fmt: skip
    """Write a classifier, a segmentor or a backbone as an ONNX file, and run it.

    Returns:
        For each input and engine what they are, and the outputs of the engine and of PyTorch.
    """
    graph = Graph(model, backbone).eval()
    names = ['images', *graph.output_names]
    axes = {name: {0: 'batch', 2: 'height', 3: 'width'} for name in names}
    if toolbox(cfg) == 'mmpretrain' and not backbone:
        axes['logits'] = {0: 'batch'}
    trace_to_onnx(
        graph, (images,), str(path), opset_version=opset, input_names=names[:1],
        output_names=names[1:], dynamic_axes=None if static else axes,
    )  # fmt: skip
    height, width = images.shape[2:]
    others = torch.rand(2, images.shape[1], height + 32, width + 64)
    for name, inputs in itertools.product(INSTALLED, (images,) if static else (images, others)):
        found = tuple(map(torch.from_numpy, open_engine(name, path)(inputs.numpy())))
        with torch.no_grad():
            yield f'{tuple(inputs.shape)} in {name}', found, graph(inputs)


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """Say how far outputs are from PyTorch's, relative to the largest.

    Raises:
        RuntimeError: If that is too far.
    """
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, expected)
    )
    if not difference <= TOLERANCE:
        raise RuntimeError(f"The outputs differ from PyTorch's by {difference:.1e}.")
    return f'largest difference {difference:.1e}'


def export(
    config: str, checkpoint: str, save_path: Path, backbone: bool = False,
    image_size: tuple[int, int] = (224, 224), image: str | None = None, static: bool = False,
    opset: int = 17, options: dict | None = None,
) -> None:  # fmt: skip
    """Write the file, after comparing what it gives.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model.
        ImportError: If MMDeploy is missing, for a detector.
        RuntimeError: If the model has no graph in ONNX, or gives something else there.
    """
    cfg = read_config(config, options)
    init_default_scope(toolbox(cfg))
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    if 'data_preprocessor' in cfg:  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    model.eval()
    print(f'loaded {load_file(model, checkpoint)}')
    if not hasattr(model, 'backbone'):
        raise RuntimeError(f'{type(model).__name__} has no backbone; nothing was exported.')
    try:
        model.backbone.switch_to_deploy()
    except (AttributeError, TypeError) as error:  # of another backbone, with other norms
        print(f'not folded: {error}')
    channels = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)).in_channels
    pixels = np.random.default_rng(0).integers(0, 256, (*image_size, channels), np.uint8)
    if image is not None:
        pixels = read_image(image)
    with written_beside(save_path) as part, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        if toolbox(cfg) in ('mmdet', 'mmrotate') and not backbone:
            import detectors

            check, runs = detectors.compare, detectors.run(cfg, model, path, pixels, static, opset)
        else:
            images = normalize(pixels.transpose(2, 0, 1)[None], cfg)
            check, runs = compare, run(cfg, model, path, images, backbone, static, opset)
        try:
            results = list(runs)
        except Exception as error:  # each head, exporter and engine has its own
            reason = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0]
            raise RuntimeError(f'{type(model).__name__} cannot be exported: {reason}') from error
        for what, found, expected in results:
            try:
                print(f'{what}: {check(found, expected)}')
            except RuntimeError as error:
                raise RuntimeError(f'{what}: {error} Nothing was written.') from None
        add_metadata(path, cfg)
        part.write_bytes(path.read_bytes())


@report_errors(CheckpointError, ImportError, OSError, RuntimeError)
def main() -> None:
    parser = make_parser('Export a model to ONNX')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('save_path', type=ending('.onnx'), help='file to write, .onnx')
    parser.add_argument('--backbone', action='store_true', help='only the backbone')
    pixels = parser.add_mutually_exclusive_group()
    pixels.add_argument('--size', type=size, default='224x224', metavar='HEIGHTxWIDTH',
                        help='of random pixels to trace, and to compare with')  # fmt: skip
    pixels.add_argument('--image', help='an image to trace, and to compare with')
    parser.add_argument('--static', action='store_true', help='for one image of that size alone')
    parser.add_argument('--opset', type=int, default=17, help="version of ONNX's operators; 17 is "
                        'the first with LayerNormalization')  # fmt: skip
    add_cfg_options(parser)
    args = parser.parse_args()
    export(
        args.config, args.checkpoint, args.save_path, args.backbone, args.size, args.image,
        args.static, args.opset, args.cfg_options,
    )  # fmt: skip
    print(f'written to {args.save_path}')


if __name__ == '__main__':
    sys.exit(main())
