"""Export a trained LSKA-VAN to ONNX, and compare it with PyTorch in the engines installed.

    python tools/deployment/export_onnx.py CONFIG CHECKPOINT SAVE_PATH.onnx [--backbone]

The graph takes `images` (B, 3, H, W) of any B, H and W, normalized as the
file's metadata say, and gives

    logits              (B, classes) of a classifier,
    logits              (B, classes, H, W) of a segmentor,
    stage1, stage2, ... with --backbone, of any model: the backbone's maps.

Detectors go by way of MMDeploy, on the original stack: the graph takes `input`, of
any size or with --static of one, and gives `dets`, `labels` and, where the model has
them, `masks`; its detections in --image are compared.

BatchNorms and layer scales are folded (`switch_to_deploy`). The file is
written only if its outputs equal PyTorch's, at another size than the traced
one too.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.onnx.utils import export as trace_to_onnx  # the one exporter that torch 2.1 has too

from engines import INSTALLED, Inference, open_engine
from lska_mm.cli import (
    add_cfg_options,
    ending,
    load_model,
    make_parser,
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

OPSET = 17  # the first with LayerNormalization
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
        logits = self.model(images, mode='tensor')
        if hasattr(self.model, 'decode_head'):
            logits = F.interpolate(
                logits, images.shape[2:], mode='bilinear', align_corners=self.model.align_corners
            )
        return (logits,)


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


def compare(infer: Inference, graph: Graph, images: Tensor) -> float:
    """Largest difference of an engine's outputs from PyTorch's, relative to the largest."""
    found = infer(images.numpy())
    with torch.no_grad():
        expected = [out.numpy() for out in graph(images)]
    return max(
        float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(found, expected)
    )


def export(
    config: str, checkpoint: str, save_path: Path, backbone: bool, image_size: tuple[int, int],
    options: dict | None = None,
) -> None:  # fmt: skip
    """Write the file, after comparing its outputs.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model.
        RuntimeError: If the model has no graph in ONNX, or gives other outputs there.
    """
    cfg, model = load_model(config, checkpoint, options)
    if not hasattr(model, 'backbone'):
        raise RuntimeError(f'{type(model).__name__} has no backbone; nothing was exported.')
    try:
        model.backbone.switch_to_deploy()
    except (AttributeError, TypeError) as error:  # of another backbone, with other norms
        print(f'not folded: {error}')
    graph = Graph(model, backbone).eval()
    first = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    channels, (height, width) = first.in_channels, image_size
    images = torch.rand(1, channels, height, width)
    others = torch.rand(2, channels, height + 32, width + 64)

    names = ['images', *graph.output_names]
    with written_beside(save_path) as part:
        axes = {name: {0: 'batch', 2: 'height', 3: 'width'} for name in names}
        if toolbox(cfg) == 'mmpretrain':
            axes['logits'] = {0: 'batch'}
        trace_to_onnx(
            graph, (images,), str(part), opset_version=OPSET, input_names=['images'],
            output_names=graph.output_names, dynamic_axes=axes,
        )  # fmt: skip
        add_metadata(part, cfg)
        engines = {name: open_engine(name, part) for name in INSTALLED}
        for engine, inputs in itertools.product(engines, (images, others)):
            difference = compare(engines[engine], graph, inputs)
            print(f'{tuple(inputs.shape)}: largest difference {difference:.1e} in {engine}')
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f'{engine} gives other outputs than PyTorch for images of '
                    f'{tuple(inputs.shape)}: they differ by {difference:.1e}. Nothing was written.'
                )


def export_detector(
    config: str, checkpoint: str, save_path: Path, image: str | None, static: bool,
    image_size: tuple[int, int], options: dict,
) -> None:  # fmt: skip
    """Write the file of a whole detector, after comparing its detections.

    Raises:
        CheckpointError: If the checkpoint is not of the config's model.
        RuntimeError: See `detectors.export_detector`.
    """
    import detectors

    if image is None:
        pixels = np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8)
    else:
        pixels = read_image(image)
    cfg, model = load_model(config, checkpoint, options)  # MMDeploy would only warn
    with written_beside(save_path) as part, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        print(detectors.export_detector(cfg, model, checkpoint, path, pixels, static))
        add_metadata(path, cfg)
        part.write_bytes(path.read_bytes())


@report_errors(CheckpointError, OSError, RuntimeError)
def main() -> None:
    parser = make_parser('Export a model to ONNX')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('save_path', type=ending('.onnx'), help='file to write, .onnx')
    parser.add_argument('--backbone', action='store_true', help='only the backbone')
    parser.add_argument('--size', type=size, default='224x224', metavar='HEIGHTxWIDTH',
                        help='of the traced image; the graph takes others too')  # fmt: skip
    parser.add_argument('--image', help='of a detector: an image to trace, and to compare with')
    parser.add_argument('--static', action='store_true', help='of a detector: for one size alone')
    add_cfg_options(parser)
    args = parser.parse_args()
    if toolbox(read_config(args.config)) in ('mmdet', 'mmrotate') and not args.backbone:
        export_detector(
            args.config, args.checkpoint, args.save_path, args.image, args.static, args.size,
            args.cfg_options,
        )  # fmt: skip
    else:
        export(
            args.config,
            args.checkpoint,
            args.save_path,
            args.backbone,
            args.size,
            args.cfg_options,
        )
    print(f'written to {args.save_path}')


if __name__ == '__main__':
    sys.exit(main())
