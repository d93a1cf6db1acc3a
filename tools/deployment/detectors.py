"""Whole detectors, by MMDeploy: what export_onnx.py does with them."""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.onnx import symbolic_opset16

try:
    from mmdeploy.apis.core.pipeline_manager import no_mp
    from mmdeploy.apis.onnx import export
    from mmdeploy.apis.utils import build_task_processor
    from mmdeploy.core import SYMBOLIC_REWRITER
except ImportError:
    raise ImportError(
        'A whole detector is exported by MMDeploy 1.3.1, which goes with the original stack '
        '(make setup STACK=openmmlab): it cannot trace on newer torch. --backbone exports the '
        'backbone alone.'
    ) from None

FOLDER = Path(__file__).parent / 'configs'
SURE = 0.5  # score from which on detections are compared
PIXELS, SCORE, MASK = 0.5, 1e-3, 0.05  # how far apart the same detection may be


@SYMBOLIC_REWRITER.register_symbolic('grid_sampler', is_pytorch=True, backend='onnxruntime')
def grid_sampler(g: Any, *inputs: Any) -> Any:
    """ONNX's own operator, where MMDeploy takes one that only its build of the engine has."""
    return symbolic_opset16.grid_sampler(g, *inputs)


def run(
    cfg: Config, model: nn.Module, path: Path, image: np.ndarray, static: bool, opset: int
) -> Iterator[tuple[str, Any, Any]]:
    """Write a detector as one ONNX file of standard operators, and run it.

    Args:
        cfg: Of the detector.
        model: The detector with its weights, in evaluation mode.
        path: File to write, .onnx.
        image: To trace and to detect in, (H, W, C), BGR.
        static: For one image of the size that the config's test pipeline makes of ``image``.
        opset: Version of ONNX's operators.

    Returns:
        For each image its size, and what ONNX Runtime and PyTorch detect in it.
    """
    masks = (cfg.model.get('roi_head') or {}).get('mask_head') or cfg.model.get('mask_head')
    name = f'{"instance-seg" if masks else "detection"}_onnxruntime'
    deploy_cfg = Config.fromfile(FOLDER / f'{name}_{"static" if static else "dynamic"}.py')
    how = deploy_cfg.onnx_config
    processor = build_task_processor(cfg, deploy_cfg, 'cpu')
    data, inputs = processor.create_input(image, data_preprocessor=model.data_preprocessor)
    with warnings.catch_warnings(), no_mp():
        warnings.simplefilter('ignore')  # of tracing, a page
        export(
            copy.deepcopy(model), inputs, str(path.with_suffix('')), 'onnxruntime',
            dict(data_samples=data['data_samples'], mode='predict'), dict(deploy_cfg=deploy_cfg),
            how.input_names, how.output_names, opset, how.dynamic_axes,
            keep_initializers_as_inputs=False, optimize=True,
        )  # fmt: skip
    exported = processor.build_backend_model([str(path)], processor.update_data_preprocessor)
    if getattr(model, 'with_rpn', False):  # the graph has one NMS for proposals of all levels
        model.rpn_head.test_cfg.nms['class_agnostic'] = True
    other = mmcv.imresize(image, (image.shape[1] * 2 // 3, image.shape[0] * 3 // 4))
    for pixels in (image,) if static else (image, other):
        data, _ = processor.create_input(pixels)
        include_padding(data, model)
        with torch.no_grad():
            found, expected = (m.test_step(data)[0].pred_instances for m in (exported, model))
        height, width = data['data_samples'][0].ori_shape
        for each in (found, expected):  # RTMDet's boxes are clipped to the image by mmdet alone
            corner = each.bboxes.new_tensor([width, height, width, height])
            each.bboxes = each.bboxes.clamp(min=0).minimum(corner)
        yield f'image of {pixels.shape[0]}x{pixels.shape[1]}', found, expected


def include_padding(data: dict, model: nn.Module) -> None:
    """Make the padding of a batch a part of its images, as it is for MMDeploy's graph."""
    padded = model.data_preprocessor(data, False)['data_samples']
    for sample, batched in zip(data['data_samples'], padded):
        height, width = batched.batch_input_shape
        x, y = sample.scale_factor
        original = math.ceil(height / y), math.ceil(width / x)
        sample.set_metainfo(dict(img_shape=(height, width), ori_shape=original))


def compare(found: Any, expected: Any, limit: int = 100) -> str:
    """Say how far detections of a graph are from those that PyTorch finds.

    Compared are those of score .5 or more, or the best five where none has it. Where mmdet
    and MMDeploy follow other rules, neither has to have what only the other promises: boxes
    of no area, a second class of a box, and what is worse than the last of ``limit``.

    Raises:
        RuntimeError: If they differ: by half a pixel, by 1e-3 in score, in number, or in
            more than a twentieth of a mask, where a pixel more or less of its border
            does not count; if there is nothing to compare.
    """
    best = expected.scores.sort(descending=True).values[:5].tolist()
    least = SURE if not best or best[0] >= SURE else best[-1]
    if len(found) >= limit or (len(found) and least < SURE):
        least = max(least, found.scores.min().item())
    found, expected = (each[each.scores >= least - SCORE] for each in (found, expected))
    if not (len(found) and len(expected)):
        raise RuntimeError(
            f'ONNX Runtime finds {len(found)} and PyTorch {len(expected)} objects of score '
            f'{least:.2f} or more: nothing to compare. Give another --image.'
        )
    boxes = (found.bboxes[:, None] - expected.bboxes).abs().amax(2)
    scores = found.scores[:, None] - expected.scores
    other = found.labels[:, None] != expected.labels
    apart = torch.maximum(boxes / PIXELS, scores.abs() / SCORE).masked_fill(other, float('inf'))
    second = (boxes <= PIXELS) & other & bool(expected.bboxes.any())
    for who, detections, distances, excused in (
        ('PyTorch', expected, apart, second & (scores > SCORE)),
        ('ONNX Runtime', found, apart.T, (second & (scores < -SCORE)).T),
    ):
        missing = (distances > 1).all(0) & ~excused.any(0) & has_area(detections)
        missing &= detections.scores >= least + SCORE
        if missing.any():
            one = detections[missing][0]
            raise RuntimeError(
                f'Only {who} finds {one.bboxes.tolist()[0]} (class {one.labels.item()}, score '
                f'{one.scores.item():.3f}).'
            )
    nearest, index = apart.min(0)
    same = (nearest <= 1) & has_area(expected)
    pairs = index[same], same.nonzero()[:, 0]
    if not same.any():
        raise RuntimeError('No object is sure enough to compare. Give another --image.')
    line = f'{len(pairs[0])} detections of score {least:.2f} or more, differences up to: '
    line += f'box {boxes[pairs].max():.1e}, score {scores[pairs].abs().max():.1e}'
    if 'masks' in expected:
        share = beyond_border(found.masks[pairs[0]], expected.masks[pairs[1]])
        line += f', masks {share:.1e}'
        if share > MASK:
            raise RuntimeError(line)
    return line


def has_area(detections: Any) -> Tensor:
    """Which boxes have an area, or need none, as SOLO's, which are all 0."""
    sides = detections.bboxes[:, 2:] - detections.bboxes[:, :2]
    return (sides > 0.01).all(1) | ~detections.bboxes.any()


def beyond_border(*masks: Tensor) -> float:
    """Largest share of a mask that is more than a pixel away from the other one's."""
    a, b = (torch.as_tensor(each).float() for each in masks)
    far = ((each - max_pool2d(of, 3, 1, 1)).relu().sum((1, 2)) for each, of in ((a, b), (b, a)))
    return (sum(far) / b.sum((1, 2)).clamp(min=1)).max().item()
