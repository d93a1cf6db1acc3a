"""Tables and plot of benchmark.py, from its rows: a dict a model and combination."""

import json
import statistics
from pathlib import Path

import matplotlib

from lska_mm.cli import markdown

matplotlib.use('Agg')
from matplotlib import pyplot as plt

ARCHS = ['tiny', 'small', 'base']
KEYS = ['arch', 'kernel_size', 'batch', 'height', 'width', 'model']
HEADER = (
    f'| arch | k | batch | size | model | ms | ± | ratio | of matmul | faults |\n|{" --- |" * 10}'
)


def merge(runs: list[list[dict]]) -> list[dict]:
    """One row for the same row of all runs: medians, and the range of the ratios."""
    rows = []
    for same in zip(*runs):
        row = dict(same[0], ratios=sorted(row['ratio'] for row in same))
        for key in ('milliseconds', 'spread', 'ratio', 'share', 'faults'):
            row[key] = statistics.median(row[key] for row in same)
        rows.append(row)
    return rows


def format_row(row: dict) -> str:
    """A row of the table, in Markdown."""
    cells = [
        row['arch'], row['kernel_size'], row['batch'], f'{row["height"]}x{row["width"]}',
        row['model'], f'{row["milliseconds"]:.1f}', f'{row["spread"]:.0%}',
        format_ratio(row), f'{row["share"]:.0%}',
        row['faults'],
    ]  # fmt: skip
    return f'| {" | ".join(map(str, cells))} |'


def overview(rows: list[dict]) -> str:
    """A line for all models in the same place: the plain one's time, the others' ratios to it."""
    models = list(dict.fromkeys(row['model'] for row in rows))
    head = ['arch', 'k', 'batch', 'size', 'plain, ms', *models[1:]]
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        place = (*(row[key] for key in KEYS[:3]), f'{row["height"]}x{row["width"]}')
        plain = row['model'] == 'plain'
        cell = f'{row["milliseconds"]:.0f}' if plain else format_ratio(row)
        lines.setdefault(place, []).append(cell)
    return markdown([head, *([*place, *cells] for place, cells in lines.items())])


def format_ratio(row: dict) -> str:
    """The ratio to the plain model; of several runs the median, the lowest and the highest."""
    ratios = row.get('ratios', [])
    span = f' ({ratios[0]:.2f} to {ratios[-1]:.2f})' if len(ratios) > 1 else ''
    return f'{row["ratio"]:.2f}{span}'


def by_arch(panel: tuple) -> tuple:
    """Sorts the panels of a plot: row by row, small images and batches first."""
    (arch, batch, size), _ = panel
    return ARCHS.index(arch), len(size), size, batch


def plot(rows: list[dict], path: Path) -> None:
    """Time against kernel size: archs from top to bottom, batches and image sizes beside."""
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row['arch'], row['batch'], f'{row["height"]}x{row["width"]}')
        panels.setdefault(key, []).append(row)
    archs = len({arch for arch, _, _ in panels})
    columns = len(panels) // archs
    figure, axes = plt.subplots(
        archs, columns, figsize=(4.5 * columns, 3.5 * archs), layout='constrained', squeeze=False
    )
    for axis, (key, members) in zip(axes.flat, sorted(panels.items(), key=by_arch)):
        for name in dict.fromkeys(row['model'] for row in members):
            points = [(r['kernel_size'], r['milliseconds']) for r in members if r['model'] == name]
            if name == 'van':  # has one kernel size
                mean = statistics.mean(value for _, value in points)
                axis.axhline(mean, color='gray', linestyle='--', label="mmpretrain's VAN, k = 21")
            else:
                axis.plot(*zip(*points), marker='o', label=name)
        axis.set(title='{}, batch {}, {}'.format(*key))
        axis.set(xlabel='kernel size', ylabel='ms per batch')
        axis.set_xticks(sorted({row['kernel_size'] for row in members}))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize='small')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(rows: list[dict]) -> list[str]:
    """What the largest kernel costs against the smallest, a line for each model."""
    small, large = (f(row['kernel_size'] for row in rows) for f in (min, max))
    times = {tuple(row[key] for key in KEYS): row['milliseconds'] for row in rows}
    return [
        f'{model}, {arch}, batch {batch}, {height}x{width}: k={large} takes '
        f'{times[arch, large, batch, height, width, model] / value:.2f} times as long as k={small}'
        for (arch, k, batch, height, width, model), value in times.items()
        if k == small < large and model != 'van'
    ]


def busy_note(rows: list[dict]) -> str:
    """Say how busy the machine was where --busy-is-fine let that pass; nothing otherwise."""
    if 'busy' not in rows[0]:
        return ''
    return f'With --busy-is-fine: others used {rows[0]["busy"]:.0f} % of the CPUs.\n\n'


def write_report(rows: list[dict], out: Path) -> str:
    """Write benchmark.json, benchmark.md and, of several kernel sizes, benchmark.png.

    Returns:
        The overview, in Markdown.
    """
    (out / 'benchmark.json').write_text(json.dumps(rows, indent=1))
    summary = busy_note(rows) + '\n'.join([overview(rows), '', *growth(rows)])
    table = '\n'.join([HEADER, *map(format_row, rows)])
    (out / 'benchmark.md').write_text(f'{summary}\n\n{table}\n')
    if len({row['kernel_size'] for row in rows}) > 1:
        plot(rows, out / 'benchmark.png')
    return summary
