"""Tables and plot of the benchmark on a GPU."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

from lska_mm.cli import markdown

matplotlib.use('Agg')
from matplotlib import pyplot as plt


def table(rows: list[dict]) -> str:
    """One line for all models in the same place: the plain one's time, the others' ratios."""
    keys = ('arch', 'kernel_size', 'batch', 'height', 'width', 'precision', 'layout', 'train')
    models = list(dict.fromkeys(row['model'] for row in rows))
    places: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in keys), {}).setdefault(row['model'], row)
    head = ['arch', 'k', 'images', 'type', 'layout', 'mode', 'plain, ms', *models[1:],
            'limit of default, ms', 'share', 'kernels']  # fmt: skip
    lines = []
    for (arch, k, batch, height, width, precision, layout, train), found in places.items():
        default = found['default']
        lines.append([
            arch, k, f'{batch} x {height}x{width}', precision, layout,
            'training' if train else 'inference', f'{found["plain"]["milliseconds"]:.2f}',
            *(f'{found[m]["ratio"]:.2f}' if m in found else '' for m in models[1:]),
            f'{default["limit"]:.2f}', f'{default["share"]:.0%}', default['kernels'],
        ])  # fmt: skip
    return markdown([head, *lines])


def profile_table(found: dict[str, Counter]) -> str:
    """Milliseconds and kernels by kind, of some models."""
    kinds = {name for counter in found.values() for name, _ in counter}
    order = sorted(kinds, key=lambda n: -max(c[n, 'ms'] for c in found.values()))
    rows = [[n, *(f'{c[n, "ms"]:.2f} ({c[n, "kernels"]})' for c in found.values())] for n in order]
    totals = [
        f'{sum(v for (_, what), v in c.items() if what == "ms"):.2f}' for c in found.values()
    ]
    return markdown([['ms (kernels)', *found], *rows, ['all', *totals]])


def plot(rows: list[dict], path: Path) -> None:
    """Milliseconds of all models, a panel for each arch and mode, and the limit on paper."""
    panels = sorted({(row['arch'], row['train']) for row in rows})
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 3.2 * len(panels)), layout='constrained', squeeze=False
    )
    colors: dict[str, Any] = {}
    for axis, (arch, train) in zip(axes.flat, panels):
        found = [r for r in rows if (r['arch'], r['train'], r['kernel_size']) == (arch, train, 23)]
        places = list(dict.fromkeys(place(row) for row in found))
        models = list(dict.fromkeys(row['model'] for row in found))
        width = 0.8 / len(models)
        for i, model in enumerate(models):
            mine = [row for row in found if row['model'] == model]
            x = [places.index(place(row)) + (i - (len(models) - 1) / 2) * width for row in mine]
            label = '' if model in colors else model
            color = colors.setdefault(model, plt.get_cmap('tab20')(len(colors)))
            axis.bar(x, [r['milliseconds'] for r in mine], width, label=label, color=color)
        limits = [row for row in found if row['model'] == 'default']
        axis.plot([places.index(place(row)) for row in limits], [row['limit'] for row in limits],
                  'k_', markersize=20, label='' if axis is not axes.flat[0] else
                  'limit of default on paper')  # fmt: skip
        axis.set_xticks(range(len(places)), places, rotation=30, ha='right', fontsize='small')
        axis.set(
            title=f'{arch}, {"training" if train else "inference"}', ylabel='ms', yscale='log'
        )
        axis.grid(axis='y', alpha=0.3)
    figure.legend(loc='outside lower center', fontsize='small', ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def place(row: dict) -> str:
    """What a group of bars is of."""
    size = f'{row["batch"]} x {row["height"]}x{row["width"]}'
    return f'{size}\n{row["precision"]}, {row["layout"]}'


def kind(name: str) -> str:
    """What a kernel is for, by its name."""
    name = name.lower()
    kinds = {
        'depthwise|grouped|_convolve|_sum_gradients': 'depth-wise convolution',
        'batch_norm|bn_fw|bn_bw|batchnorm': 'BatchNorm', 'layer_norm|layernorm': 'LayerNorm',
        'gelu': 'GELU', 'conv|implicit|wgrad|dgrad|fprop': 'convolution',
        'gemm|cutlass|nvjet': 'matrix product',
        'memcpy|memset|copy|nchwtonhwc|nhwctonchw': 'copy', 'reduce': 'sum',
        'mulfunctor|mul_': 'product', 'add': 'sum of two', 'triton': 'compiled',
    }  # fmt: skip
    for words, what in kinds.items():
        if any(word in name for word in words.split('|')):
            return what
    return 'other'
