"""Compare settings that were each trained with several seeds.

    python .dev_scripts/seeds.py WORK_DIR/*/ --metrics KEY ...

Each folder is a setting and holds a work dir for every seed. Prints, for each
metric and each validation, mean and standard deviation over the seeds, as
Markdown. A step is an epoch or an iteration, as the training counts. A folder
trained twice counts with its last log.
"""

import json
import statistics
import sys
from pathlib import Path

from lska_mm.cli import make_parser, markdown, report_errors

Scores = dict[int, float]  # step of the validation: value of the metric


def load_scores(work_dir: Path, metric: str) -> Scores:
    """The validations in the last log of a training.

    Raises:
        FileNotFoundError: If nothing was trained there.
        ValueError: If the log is damaged, or has no such metric; names those that it has.
    """
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'), key=lambda log: log.stat().st_mtime)
    if not logs:
        raise FileNotFoundError(f'No training log below {work_dir} (*/vis_data/scalars.json).')
    try:
        records = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f'{logs[-1]} is damaged: {error}.') from None
    tests = [record for record in records if 'lr' not in record]
    scores = {record['step']: record[metric] for record in tests if metric in record}
    if not scores:
        known = sorted({key for record in tests for key in record} - {'step', 'time', 'data_time'})
        raise ValueError(f'{logs[-1]} has no {metric}; it has {", ".join(known) or "no metrics"}.')
    return scores


def make_table(settings: dict[str, list[Scores]], metric: str) -> str:
    """Markdown: a row for each setting, a column for each validation."""
    steps = sorted({step for runs in settings.values() for scores in runs for step in scores})
    rows = [['setting', 'seeds', *(f'{metric}, step {step}' for step in steps)]]
    for name, runs in settings.items():
        cells = []
        for step in steps:
            values = [scores[step] for scores in runs if step in scores]
            spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.3f}{spread}' if values else '')
        rows.append([name, str(len(runs)), *cells])
    return markdown(rows)


@report_errors(OSError, ValueError)
def main() -> None:
    parser = make_parser('Compare settings over seeds')
    parser.add_argument('settings', type=Path, nargs='+', help='folders of work dirs, one a seed')
    parser.add_argument(
        '--metrics', nargs='+', default=['coco/segm_mAP'], help='keys of the validation log'
    )
    args = parser.parse_args()
    for folder in args.settings:
        if not folder.is_dir() or not any(folder.iterdir()):
            raise FileNotFoundError(f'No work dirs in {folder}; expected one for each seed.')
    for metric in args.metrics:
        settings = {
            folder.name: [load_scores(run, metric) for run in sorted(folder.iterdir())]
            for folder in args.settings
        }
        print(f'{make_table(settings, metric)}\n')


if __name__ == '__main__':
    sys.exit(main())
