"""Compare the cost and the receptive fields of gates and kernel sizes.

    python tools/analysis_tools/compare_kernels.py [--arch tiny] [--attentions LSKA LKA]
        [--kernel-sizes 7 23 53] [--time] --out DIR

writes compare_kernels.md, .csv, .json and .png to DIR, with a row for each classifier
of 1000 classes:

    parameters       of the whole model, with the head
    multiply-adds    of convolutions and matrix products, for one image of --size
    ms, ±            with --time, inference on one image: the median, and half the
                     interquartile range relative to it; needs an idle machine
    training MiB     memory kept for the backward pass of one image
    gate sees        receptive field of a gate on its map: its kernel size
    network sees     theoretical receptive field of the last map, in pixels
    50 %, 99 % in    side of the square that contains so much of the effective receptive
                     field (tools/visualization/erf.py) with random weights, averaged
                     over images of noise, 256 x 256. A new network scales its
                     branches by 0.01, so its gates hardly count yet.
"""

import argparse
import csv
import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.utils.benchmark import Timer

from counting import Classifier, count_costs, saved_bytes
from lska_mm import LSKAVAN
from lska_mm.cli import markdown, report_errors, size
from lska_mm.models.archs import ARCHS
from lska_mm.models.lska import ATTENTIONS, split_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'visualization'))
from erf import contribution_squares, effective_receptive_field

matplotlib.use('Agg')
from matplotlib import pyplot as plt

NOISE = (4, 3, 256, 256)  # images for the effective receptive field
SHARES = (0.5, 0.99)
SECONDS = 1  # of measuring a time
# For each key of a row, the column's header and the format of a cell.
COLUMNS = dict(
    attention=('gate', str),
    kernel_size=('k', str),
    parameters=('parameters (M)', lambda n: f'{n / 1e6:.2f}'),
    multiply_adds=('multiply-adds (G)', lambda n: f'{n / 1e9:.2f}'),
    milliseconds=('ms', lambda ms: f'{ms:.1f}'),
    spread=('±', lambda share: f'{share:.0%}'),
    saved_bytes=('training MiB', lambda n: f'{n / 2**20:.1f}'),
    gate_field=('gate sees', str),
    network_field=('network sees', str),
    erf_50=('50 % in', str),
    erf_99=('99 % in', str),
)
PANELS = dict(
    parameters=('parameters (M)', 1e6),
    multiply_adds=('multiply-adds (G)', 1e9),
    milliseconds=('inference (ms)', 1),
    saved_bytes=('kept for the backward pass (MiB)', 2**20),
)


def network_field(backbone: LSKAVAN) -> int:
    """Return the theoretical receptive field of the last map, in pixels of the image."""
    field = stride = 1
    for stage in range(1, backbone.num_stages + 1):
        proj = getattr(backbone, f'patch_embed{stage}').proj
        field += (proj.kernel_size[0] - 1) * stride
        stride *= proj.stride[0]
        for block in getattr(backbone, f'block{stage}'):
            gate, mlp = block.attn.spatial_gating_unit, block.mlp.dwconv
            field += (gate.kernel_size - 1 + mlp.kernel_size[0] - 1) * stride
    return field


def count(arch: str, kernel_size: int, attention: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return a row without times."""
    torch.manual_seed(0)
    model = Classifier(arch, kernel_size, attention)
    backbone = model.backbone
    logging.disable(logging.INFO)  # would log a line for each parameter
    backbone.init_weights()
    logging.disable(logging.NOTSET)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    field = effective_receptive_field(backbone.eval(), noise)
    half, nearly_all = contribution_squares(field, SHARES)
    return dict(
        attention=attention,
        kernel_size=kernel_size,
        saved_bytes=saved_bytes(model.train(), torch.rand(1, 3, *size)),
        gate_field=backbone.block1[0].attn.spatial_gating_unit.kernel_size,
        network_field=network_field(backbone),
        erf_50=half.side,
        erf_99=nearly_all.side,
        **count_costs(model, size),
    )


def measure(arch: str, kernel_size: int, attention: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the times of a row."""
    model = Classifier(arch, kernel_size, attention).eval()
    variables = dict(model=model, image=torch.rand(1, 3, *size))
    timer = Timer('model(image)', globals=variables, num_threads=torch.get_num_threads())
    with torch.no_grad():
        measured = timer.blocked_autorange(min_run_time=SECONDS)
    return dict(milliseconds=1e3 * measured.median, spread=measured.iqr / 2 / measured.median)


def make_table(rows: list[dict]) -> str:
    """Markdown: a row for each gate and kernel size."""
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    cells = [[write(row[key]) for key, (_, write) in columns.items()] for row in rows]
    return markdown([[head for head, _ in columns.values()], *cells])


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Each cost against kernel size, a line for each gate."""
    panels = {key: panel for key, panel in PANELS.items() if key in rows[0]}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.5 * len(panels), 3.9), layout='constrained'
    )
    sizes = sorted({row['kernel_size'] for row in rows})
    for axis, (key, (label, unit)) in zip(axes, panels.items()):
        for attention, marker in zip(dict.fromkeys(row['attention'] for row in rows), 'osD^'):
            points = [
                (row['kernel_size'], row[key] / unit)
                for row in rows
                if row['attention'] == attention
            ]
            axis.plot(*zip(*sorted(points)), marker=marker, markersize=5, label=attention)
        axis.set(title=label, xlabel='kernel size', xticks=sizes)
        axis.set_ylim(0, 1.08 * max(row[key] for row in rows) / unit)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@report_errors(OSError, ValueError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Compare gates and kernel sizes')
    parser.add_argument('--arch', default='tiny', choices=list(ARCHS))
    parser.add_argument('--attentions', nargs='+', default=list(ATTENTIONS), choices=ATTENTIONS)
    parser.add_argument('--kernel-sizes', nargs='+', type=int, default=[7, 23, 53])
    parser.add_argument('--size', type=size, default='224x224', metavar='HEIGHTxWIDTH',
                        help='of the image; more than 32x32 (default: %(default)s)')  # fmt: skip
    parser.add_argument('--time', action='store_true', help='also measure times')
    parser.add_argument('--out', type=Path, required=True, help='folder for tables and plot')
    args = parser.parse_args()
    if max(args.size) <= 32:
        parser.error('--size must be larger than 32x32: its last map has a single point')
    for k in args.kernel_sizes:  # refuse an invalid one before minutes of work
        split_kernel(k)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for attention, k in itertools.product(args.attentions, args.kernel_sizes):
        place = args.arch, k, attention, args.size
        rows.append(count(*place) | (measure(*place) if args.time else {}))
        print(f'{attention}, k={k}', flush=True)
    out = args.out / 'compare_kernels'
    title = f'{args.arch}, {args.size[0]} x {args.size[1]} pixels'
    columns = [key for key in COLUMNS if key in rows[0]]
    table = make_table(rows)
    out.with_suffix('.md').write_text(f'{table}\n')
    out.with_suffix('.json').write_text(json.dumps(rows, indent=1))
    with out.with_suffix('.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, title, out.with_suffix('.png'))
    print(f'\n{title}\n\n{table}\n\nwritten to {out}.{{md,csv,json,png}}')


if __name__ == '__main__':
    sys.exit(main())
