"""Whole detectors, by MMDeploy: what export_onnx.py does with them."""

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import nn

FOLDER = Path(__file__).parent / 'configs'
SURE = 0.5  # score from which on detections are compared


def export_detector(
    cfg: Config, model: nn.Module, checkpoint: str, path: Path, image: np.ndarray, static: bool
) -> str:
    """Write a detector as one ONNX file of standard operators, and compare its detections.

    Args:
        cfg: Of the detector.
        model: The detector with its weights, to compare with.
        checkpoint: The file of the weights.
        path: File to write.
        image: To trace and to compare with, (H, W, 3), BGR.
        static: For one image of the size that the config's test pipeline makes of ``image``.

    Returns:
        A line for each image that was compared.

    Raises:
        RuntimeError: If MMDeploy is missing; if detections differ.
    """
    if find_spec('mmdeploy') is None:
        raise RuntimeError(
            'A whole detector is exported by MMDeploy 1.3.1, which goes with the original stack '
            '(make setup STACK=openmmlab): it cannot trace on newer torch. --backbone exports the '
            'backbone alone.'
        )
    from mmdeploy.apis import torch2onnx
    from mmdeploy.apis.utils import build_task_processor

    kind = 'instance-seg' if _has_masks(cfg.model) else 'detection'
    deploy_cfg = Config.fromfile(
        FOLDER / f'{kind}_onnxruntime_{"static" if static else "dynamic"}.py'
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing, a page
        torch2onnx(image, str(path.parent), path.name, deploy_cfg, cfg, checkpoint, 'cpu')
    processor = build_task_processor(cfg, deploy_cfg, 'cpu')
    exported = processor.build_backend_model([str(path)], processor.update_data_preprocessor)
    if getattr(model, 'with_rpn', False):  # the graph has one NMS for proposals of all levels
        model.rpn_head.test_cfg.nms['class_agnostic'] = True
    # A graph for any size is tried with another, too.
    height, width = image.shape[:2]
    lines = []
    for part in (image,) if static else (image, image[: height * 3 // 4, : width * 2 // 3]):
        data, _ = processor.create_input(part)
        include_padding(data, model)
        lines.append(compare(*(m.test_step(data)[0].pred_instances for m in (exported, model))))
    return '\n'.join(lines)


def include_padding(data: dict, model: nn.Module) -> None:
    """Make the padding of a batch a part of its images, as it is for MMDeploy's graph."""
    padded = model.data_preprocessor(data, False)['data_samples']
    for sample, batched in zip(data['data_samples'], padded):
        height, width = batched.batch_input_shape
        x, y = sample.scale_factor
        original = math.ceil(height / y), math.ceil(width / x)
        sample.set_metainfo(dict(img_shape=(height, width), ori_shape=original))


def _has_masks(model: Any) -> bool:
    return bool((model.get('roi_head') or {}).get('mask_head') or model.get('mask_head'))


def compare(found: Any, expected: Any) -> str:
    """Say how far detections of score .5 or more are from those that PyTorch finds.

    Raises:
        RuntimeError: If they differ: by half a pixel, by 1e-3 in score, by an IoU
            of masks below .99, or in number.
    """
    found, expected = found[found.scores >= SURE - 1e-3], expected[expected.scores >= SURE]
    if not len(expected):
        return f'no detection of score {SURE} or more: nothing to compare; give another --image'
    more = int((found.scores >= SURE + 1e-3).sum()) - len(expected)
    if more > 0:
        raise RuntimeError(f'ONNX Runtime finds {more} more than PyTorch. Nothing was written.')
    worst = dict(box=0.0, score=0.0)
    if 'masks' in expected:
        worst['1 - IoU of masks'] = 0.0
    for i in range(len(expected)):
        one = expected[i]
        distance = (found.bboxes - one.bboxes).abs().amax(1)
        distance[found.labels != one.labels] = float('inf')
        if not len(found) or not distance.min() <= 0.5:
            raise RuntimeError(
                f'ONNX Runtime does not find {one.bboxes.tolist()[0]} (score '
                f'{one.scores.item():.3f}), as PyTorch does. Nothing was written.'
            )
        other = found[int(distance.argmin())]
        worst['box'] = max(worst['box'], distance.min().item())
        worst['score'] = max(worst['score'], (other.scores - one.scores).abs().item())
        if 'masks' in expected:
            a, b = np.asarray(other.masks, bool), np.asarray(one.masks, bool)
            iou = (a & b).sum() / max((a | b).sum(), 1)
            worst['1 - IoU of masks'] = max(worst['1 - IoU of masks'], 1 - float(iou))
    if worst['score'] > 1e-3 or worst.get('1 - IoU of masks', 0) > 0.01:
        raise RuntimeError(f'ONNX Runtime differs from PyTorch by {worst}. Nothing was written.')
    differences = ', '.join(f'{key} {value:.1e}' for key, value in worst.items())
    return f'{len(expected)} detections of score {SURE} or more, differences up to: {differences}'
