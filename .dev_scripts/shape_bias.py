"""Shape bias of classifiers, from the CSV files of mmpretrain's ShapeBiasMetric.

    python .dev_scripts/shape_bias.py work_dirs/shape_bias/*.csv --out shape_bias.png

Each image has the shape of one class and the texture of another. The shape bias is
the share of shape among the decisions for either of the two (Geirhos et al., ICLR
2019, arXiv:1811.12231); other decisions do not count. Prints it as a Markdown table,
and draws it for each class. Files of people's decisions, which that work published
with the same columns, count together as `humans`.

mmpretrain's own shape_bias.py draws a similar picture; it needs pandas 1 and a
network, neither of which the pinned stacks have.
"""

import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib

from lska_mm.cli import make_parser, markdown, png, report_errors

matplotlib.use('Agg')
from matplotlib import pyplot as plt

COLUMNS = ('subj', 'object_response', 'category', 'imagename')


class Decisions(NamedTuple):
    """How often images of a cue conflict were named by their shape or texture, of how many."""

    shape: int
    texture: int
    images: int

    @property
    def shape_bias(self) -> float | None:
        """Share of shape, None where there is no decision for either."""
        return self.shape / (self.shape + self.texture) if self.shape + self.texture else None


def texture(name: str) -> str:
    """The class of the texture in the name of an image: bear of ``airplane1-bear2.png``."""
    return re.sub(r'\d', '', Path(name).stem.split('-')[-1])


def read(paths: list[Path]) -> dict[str, dict[str, Decisions]]:
    """Decisions by model and by class of the shape, both in the order of the files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file lacks a column, or holds no image of a cue conflict.
    """
    counts: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'No CSV file at {path}.')
        with path.open(newline='', errors='replace') as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f'{path} lacks the columns {", ".join(missing)}.')
            conflicts = [row for row in reader if row['category'] != texture(row['imagename'])]
        if not conflicts:
            raise ValueError(f'{path} holds no image whose shape and texture differ.')
        for row in conflicts:
            model = 'humans' if row['subj'].startswith('subject-') else row['subj']
            cues = {row['category']: 'shape', texture(row['imagename']): 'texture'}
            count = counts[model][row['category']]
            count[cues.get(row['object_response'], 'other')] += 1
    return {
        model: {name: Decisions(c['shape'], c['texture'], c.total()) for name, c in of.items()}
        for model, of in counts.items()
    }


def total(by_class: dict[str, Decisions]) -> Decisions:
    """The decisions on all classes together."""
    return Decisions(*map(sum, zip(*by_class.values())))


def make_table(models: dict[str, dict[str, Decisions]]) -> str:
    """Markdown: a row for each model."""
    rows = [['model', 'images', 'shape', 'texture', 'shape bias']]
    for name, by_class in models.items():
        shape, texture, images = decisions = total(by_class)
        bias = '' if decisions.shape_bias is None else f'{decisions.shape_bias:.3f}'
        rows.append([name, str(images), f'{shape / images:.1%}', f'{texture / images:.1%}', bias])
    return markdown(rows)


def plot(models: dict[str, dict[str, Decisions]], path: Path) -> None:
    """A row for each class, a marker for each model; a line at the shape bias over all classes."""
    classes = sorted({name for by_class in models.values() for name in by_class}, reverse=True)
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(classes) + 1.8), layout='constrained')
    for i, (model, by_class) in enumerate(models.items()):
        below = 0.5 * ((i + 0.5) / len(models) - 0.5)  # so that none hides another
        points = [
            (decisions.shape_bias, classes.index(name) - below)
            for name, decisions in by_class.items()
            if decisions.shape_bias is not None
        ]
        color, bias = f'C{i % 10}', total(by_class).shape_bias
        label = model if bias is None else f'{model} ({bias:.2f})'
        axis.scatter(
            [x for x, _ in points], [y for _, y in points], color=color, label=label,
            marker='oDsv^<>PX*'[i % 10], s=45, zorder=3, clip_on=False,
        )  # fmt: skip
        if bias is not None:
            axis.axvline(bias, color=color, linewidth=1.2)
    axis.set(
        xlim=(0, 1), ylim=(-0.7, len(classes) - 0.3), yticks=range(len(classes)),
        yticklabels=classes, xlabel='shape bias: 0 texture only, 1 shape only',
    )  # fmt: skip
    axis.grid(alpha=0.3)
    figure.legend(loc='outside upper center', ncols=min(len(models), 3), fontsize='small')
    figure.savefig(path, dpi=110)
    plt.close(figure)


@report_errors(OSError, ValueError, csv.Error)
def main() -> None:
    parser = make_parser('Shape bias of classifiers')
    parser.add_argument('csv', type=Path, nargs='+', help='files of ShapeBiasMetric')
    parser.add_argument('--out', type=png, required=True, help='file to write, .png')
    args = parser.parse_args()
    models = read(args.csv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(models, args.out)
    print(f'{make_table(models)}\nwritten to {args.out}')


if __name__ == '__main__':
    sys.exit(main())
