"""Train and validate for a long time, and look at what that takes from the system.

    python .dev_scripts/soak.py CONFIG [--minutes 60] [--runners 4] --out DIR

A Runner trains until its share of the time is over; the next, in the same
process, resumes from its last checkpoint. The schedule of the config is
repeated for as long as that takes. DIR takes soak.csv (a line a sample:
resident memory of the process and of its workers, open files of a process,
how many workers and zombies there are), soak.png, and the work dir. Growth is
the median of the last quarter of the samples less that of the first quarter
after the warm-up. More of it than --limit, more open files than the log that
MMEngine keeps of each Runner, a zombie, or a worker that outlives its Runner
ends it with 1.

Memory that mirrors files (libraries) is not counted: the system takes it back
as it likes. What workers share with the process that forked them counts in both.
"""

import argparse
import csv
import gc
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import psutil
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook

from lska_mm.cli import build_runner, report_errors

matplotlib.use('Agg')
from matplotlib import pyplot as plt

MIB = 2**20
COLUMNS = ['seconds', 'runner', 'iter', 'main_mib', 'workers_mib', 'files', 'workers', 'zombies']
GROWING = dict(main_mib='MiB', workers_mib='MiB', files='files')  # what may not, and its unit


def own_memory(process: psutil.Process) -> float:
    """Resident memory that mirrors no file, in MiB."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / MIB


def look() -> dict[str, float]:
    """What this process and its children hold now."""
    main, memory, files, zombies = psutil.Process(), 0.0, 0, 0
    children = main.children(recursive=True)
    for child in children:
        try:
            memory += own_memory(child)
            files += child.num_fds()
            zombies += child.status() == psutil.STATUS_ZOMBIE
        except psutil.ZombieProcess:
            zombies += 1
        except psutil.NoSuchProcess:
            pass  # ended while it was looked at
    return dict(
        main_mib=own_memory(main),
        workers_mib=memory,
        files=(main.num_fds() + files) / (1 + len(children) - zombies),
        workers=len(children) - zombies,
        zombies=zombies,
    )


class Sampler(Hook):
    """Takes samples during training and validation, and ends it in time.

    Args:
        path: The CSV file to write.
        interval: Seconds between two samples.
    """

    priority = 'LOWEST'

    def __init__(self, path: Path, interval: float) -> None:
        self.samples: list[dict[str, float]] = []
        self.path, self.interval = path, interval
        self.begin, self.end, self.runner = time.monotonic(), 0.0, 0
        path.write_text(','.join(COLUMNS) + '\n')

    def sample(self, iteration: int) -> None:
        seconds = time.monotonic() - self.begin
        if self.samples and seconds - self.samples[-1]['seconds'] < self.interval:
            return
        row = dict(seconds=seconds, runner=self.runner, iter=iteration, **look())
        self.samples.append(row)
        with self.path.open('a') as file:
            csv.writer(file).writerow([round(row[column], 1) for column in COLUMNS])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.sample(runner.iter + 1)
        if time.monotonic() > self.end:
            runner.train_loop.stop_training = True

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.sample(runner.iter)


def growth(samples: list[dict[str, float]], column: str, warm_up: float) -> tuple[float, float]:
    """Where a column starts after the warm-up (a share of the time), and what it grows by."""
    begin = warm_up * samples[-1]['seconds']
    values = [sample[column] for sample in samples if sample['seconds'] >= begin]
    quarter = max(1, len(values) // 4)
    first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    return first, last - first


def plot(samples: list[dict[str, float]], warm_up: float, path: Path) -> None:
    """Memory and open files over time; a dotted line where a Runner starts."""
    minutes = [sample['seconds'] / 60 for sample in samples]
    figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True, layout='constrained')
    titles = (
        'resident memory, MiB',
        'resident memory of the workers, MiB',
        'open files of a process',
    )
    for axis, column, title in zip(axes, GROWING, titles):
        values = [sample[column] for sample in samples]
        axis.plot(minutes, values, linewidth=1)
        highest = max(1, *values)
        axis.set_ylim(-0.05 * highest, 1.15 * highest)  # a flat line stays off the frame
        axis.set_title(title)
        axis.axvspan(0, warm_up * minutes[-1], color='0.92')
        for before, after in itertools.pairwise(samples):
            if before['runner'] != after['runner']:
                axis.axvline(after['seconds'] / 60, color='0.6', linestyle=':')
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel('minutes (grey: warm-up; dotted: a new Runner)')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def remaining_workers() -> int:
    """Workers left when the Runner is gone; those that are ending have some seconds."""
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.join(timeout=10)
    return len(multiprocessing.active_children())


def soak(cfg: Config, sampler: Sampler, seconds: float, runners: int) -> int:
    """Train with one Runner after the other; the workers that outlived theirs."""
    left = 0
    for sampler.runner in range(1, runners + 1):
        sampler.end = sampler.begin + seconds * sampler.runner / runners
        turn = cfg.copy()
        turn.resume = sampler.runner > 1
        turn.experiment_name = f'soak-{sampler.runner}'  # MMEngine keeps its logs by this name
        runner = build_runner(turn)
        runner.register_hook(sampler)
        runner.train()
        del runner
        left += remaining_workers()
    return left


class LeakError(RuntimeError):
    """Something grew, or was left over."""


def positive(text: str) -> float:
    """The type of an argument: a number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return float(text)


@report_errors(LeakError, FileNotFoundError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Train for long and watch memory and files')
    parser.add_argument('config')
    parser.add_argument('--minutes', type=positive, default=60)
    parser.add_argument('--runners', type=int, default=4, help='one after the other')
    parser.add_argument('--interval', type=positive, default=5, help='seconds between samples')
    parser.add_argument('--warm-up', type=float, default=0.25, help='share of the time')
    parser.add_argument('--limit', type=float, default=20, help='MiB that memory may grow by')
    parser.add_argument('--out', type=Path, required=True, help='folder for samples and plot')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    args = parser.parse_args()
    if args.runners < 1:
        parser.error('--runners must be 1 or more')

    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir, cfg.launcher = str(args.out / 'work_dir'), 'none'
    # Time ends the training, not the schedule.
    cfg.train_cfg['max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'] = 10**9
    args.out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(args.out / 'soak.csv', args.interval)
    left = soak(cfg, sampler, 60 * args.minutes, args.runners)

    samples = sampler.samples
    plot(samples, args.warm_up, args.out / 'soak.png')
    print(
        f'soak: {samples[-1]["iter"]:.0f} iterations, {args.runners} Runners, '
        f'{samples[-1]["seconds"] / 60:.1f} minutes, {len(samples)} samples'
    )
    faults = []
    for column, unit in GROWING.items():
        first, grown = growth(samples, column, args.warm_up)
        print(f'soak: {column} {first:.1f} {unit}, grown by {grown:+.1f} ({grown / first:+.2%})')
        if grown > (args.limit if unit == 'MiB' else args.runners):
            faults.append(f'{column} grew by {grown:.1f} {unit}')
    zombies = max(sample['zombies'] for sample in samples)
    print(f'soak: {zombies:.0f} zombies, {left} workers that outlived their Runner')
    faults += [f'{zombies:.0f} zombies'] if zombies else []
    faults += [f'{left} workers outlived their Runner'] if left else []
    if faults:
        raise LeakError(f'{"; ".join(faults)}; see {args.out}/soak.png')


if __name__ == '__main__':
    sys.exit(main())
