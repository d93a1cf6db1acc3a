"""Rebuild the reference checkpoints that `outputs.npz` was computed from.

A reference checkpoint is not stored: every tensor is a pure function of its
name and shape, so the same weights can be rebuilt anywhere.

    state = build_state('tiny', 23)           # {name: float32 array}
    image = build_image(2, 96)                # (2, 3, 96, 96) float32

Names and shapes come from `layout.json`, the layout of the checkpoints that
the LSKA authors publish (ImageNet-1K classification, timm style).
"""

import json
import pathlib
import zlib

import numpy as np

LAYOUT = pathlib.Path(__file__).with_name('layout.json')


def _tensor(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith('num_batches_tracked'):
        return np.array(100, dtype=np.int64)
    noise = rng.standard_normal(shape)
    is_norm = 'norm' in name.rsplit('.', 2)[-2]
    if name.endswith('running_var') or (is_norm and name.endswith('weight')):
        return (1 + 0.2 * np.abs(noise)).astype(np.float32)
    if 'layer_scale' in name:
        return (0.2 + 0.05 * noise).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * noise).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (noise / np.sqrt(fan_in)).astype(np.float32)


def build_state(arch, kernel_size):
    layout = json.loads(LAYOUT.read_text())[f'{arch}-k{kernel_size}']
    return {name: _tensor(name, shape) for name, shape in layout.items()}


def build_image(batch, side):
    rng = np.random.default_rng(2309_01439)
    return rng.standard_normal((batch, 3, side, side)).astype(np.float32)
