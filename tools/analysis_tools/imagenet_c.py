"""Test a classifier on ImageNet-C: top-1 per corruption and severity, and mCE.

    python tools/analysis_tools/imagenet_c.py CONFIG CHECKPOINT ROOT --work-dir DIR

ROOT is laid out as ROOT/corruption/severity/class/image. Each result is
written to DIR/imagenet_c.json as soon as it is measured, so an interrupted test continues
where it stopped; a table (imagenet_c.md) and a plot (imagenet_c.png) follow at the end.

The corruption error CE sums a classifier's errors over the severities and
divides by AlexNet's sum; mCE averages CE over the 15 standard corruptions
(Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261). The average over all
19, with the four extra ones, is what the LSKA paper's script computes.
"""

import hashlib
import json
import sys
import textwrap
from pathlib import Path

import matplotlib
from mmengine.config import Config
from mmengine.runner import TestLoop

from lska_mm.cli import base_parser, build_runner, load_config, markdown, report_errors
from lska_mm.engine.hooks import CheckWeightsHook
from lska_mm.weights.convert import written_beside
from lska_mm.weights.loader import find_checkpoint
from lska_mm.weights.names import CheckpointError

matplotlib.use('Agg')
from matplotlib import pyplot as plt

SEVERITIES = range(1, 6)
# AlexNet's top-1 error, in per cent, averaged over the severities.
STANDARD = dict(
    gaussian_noise=88.6, shot_noise=89.4, impulse_noise=92.3, defocus_blur=82.0,
    glass_blur=82.6, motion_blur=78.6, zoom_blur=79.8, snow=86.7, frost=82.7, fog=81.9,
    brightness=56.5, contrast=85.3, elastic_transform=64.6, pixelate=71.8, jpeg_compression=60.7,
)  # fmt: skip
EXTRA = dict(speckle_noise=84.5, gaussian_blur=78.7, spatter=71.8, saturate=65.8)
ALEXNET = {**STANDARD, **EXTRA}

Accuracies = dict[str, dict[str, float]]  # corruption, severity: top-1 in per cent


def find_folders(root: Path) -> list[tuple[str, str]]:
    """Return the (corruption, severity) folders of ``root``, in the order of `ALEXNET`.

    Raises:
        FileNotFoundError: If there is none, or a severity of one is missing.
    """
    corruptions = [name for name in ALEXNET if (root / name).is_dir()]
    if not corruptions:
        raise FileNotFoundError(
            f'No corruption in {root}; expected folders like {root}/gaussian_noise/1/CLASS.'
        )
    folders = [(name, str(severity)) for name in corruptions for severity in SEVERITIES]
    missing = ['/'.join(folder) for folder in folders if not root.joinpath(*folder).is_dir()]
    if missing:
        raise FileNotFoundError(f'{root} lacks {", ".join(missing)}.')
    return folders


def corruption_error(accuracies: dict[str, float], alexnet: float) -> float:
    """Return CE in per cent, from top-1 by severity and AlexNet's mean error."""
    return 100 * sum(100 - top1 for top1 in accuracies.values()) / len(accuracies) / alexnet


def mean_ce(accuracies: Accuracies, corruptions: dict[str, float]) -> float | None:
    """Return mCE in per cent over ``corruptions``; None unless all were measured."""
    if any(len(accuracies.get(name, ())) < len(SEVERITIES) for name in corruptions):
        return None
    errors = [corruption_error(accuracies[name], ce) for name, ce in corruptions.items()]
    return sum(errors) / len(errors)


def load_results(path: Path, checkpoint: str) -> dict:
    """Return the results so far, if there are any.

    Raises:
        ValueError: If the file holds results of another checkpoint.
    """
    digest = hashlib.sha256(Path(find_checkpoint(checkpoint)).read_bytes()).hexdigest()
    if not path.exists():
        return dict(checkpoint=digest, top1={})
    results = json.loads(path.read_text())
    if results['checkpoint'] != digest:
        raise ValueError(f'{path} has results of another checkpoint; choose another --work-dir.')
    return results


def test_folder(runner, cfg: Config, folder: Path) -> float:
    """Return top-1 in per cent on one folder of classes."""
    dataloader = cfg.test_dataloader.copy()
    dataset = dataloader.dataset.copy()
    dataset.pop('split', None)
    dataset.update(data_root=str(folder), data_prefix='', ann_file='')
    dataloader.update(dataset=dataset, persistent_workers=False)
    loop = TestLoop(runner, dataloader=dataloader, evaluator=dict(type='Accuracy', topk=(1,)))
    return loop.run()['accuracy/top1']


def make_table(accuracies: Accuracies) -> str:
    """Markdown: a row for each corruption, and both means."""
    head = ['corruption', *(f'top-1, {severity}' for severity in SEVERITIES), 'top-1', 'CE']
    rows = [head]
    for name, by_severity in accuracies.items():
        values = list(by_severity.values())
        cells = [*values, sum(values) / len(values), corruption_error(by_severity, ALEXNET[name])]
        rows.append([name, *(f'{cell:.2f}' for cell in cells)])
    table = markdown(rows)
    for title, corruptions in (('the 15 standard', STANDARD), ('all 19', ALEXNET)):
        mce = mean_ce(accuracies, corruptions)
        lacking = [name for name in corruptions if name not in accuracies]
        text = f'{mce:.2f}' if mce is not None else f'not computed, without {", ".join(lacking)}'
        table += f'\n\nmCE over {title} corruptions: {text}'
    return table + '\n'


def plot(accuracies: Accuracies, title: str, path: Path) -> None:
    """Top-1 against severity, a line for each corruption, which looks the same in every plot."""
    figure, axis = plt.subplots(figsize=(9, 6), layout='constrained')
    for name, by_severity in accuracies.items():
        i = list(ALEXNET).index(name)  # ten colors, seven markers: no two lines share both
        severities = [int(severity) for severity in by_severity]
        style = dict(
            color=f'C{i % 10}', marker='osD^vPX'[i % 7], ls='--' if name in EXTRA else '-'
        )
        axis.plot(severities, list(by_severity.values()), label=name, **style)
    axis.set_title(textwrap.fill(title, 80), fontsize=11)
    axis.set(xticks=list(SEVERITIES), xlabel='severity', ylabel='top-1 (%)', ylim=(-2, 102))
    axis.grid(alpha=0.3)
    title = 'dashed: extra ones' if set(accuracies) & set(EXTRA) else None
    figure.legend(loc='outside right upper', fontsize='small', title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@report_errors(CheckpointError, OSError, ValueError)
def main() -> None:
    parser = base_parser('Test a classifier on ImageNet-C')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('root', type=Path, help='folder of ImageNet-C')
    args = parser.parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    folders = find_folders(args.root)
    out = Path(cfg.work_dir)
    out.mkdir(parents=True, exist_ok=True)
    results = load_results(out / 'imagenet_c.json', args.checkpoint)

    runner = build_runner(cfg)
    runner.register_hook(CheckWeightsHook())
    runner.call_hook('before_run')
    runner.load_or_resume()
    for i, (corruption, severity) in enumerate(folders, start=1):
        done = results['top1'].setdefault(corruption, {})
        if severity not in done:
            print(f'{i} of {len(folders)}: {corruption} {severity} ...', flush=True)
            done[severity] = test_folder(runner, cfg, args.root / corruption / severity)
            with written_beside(out / 'imagenet_c.json') as part:  # it may be interrupted
                part.write_text(json.dumps(results, indent=1))
        print(f'{corruption} {severity}: top-1 {done[severity]:.2f}', flush=True)

    table = make_table(results['top1'])
    (out / 'imagenet_c.md').write_text(table)
    title = f'{Path(args.config).stem}, {Path(args.checkpoint).name}'
    plot(results['top1'], title, out / 'imagenet_c.png')
    print(f'\n{table}\nwritten to {out}/imagenet_c.{{json,md,png}}')


if __name__ == '__main__':
    sys.exit(main())
