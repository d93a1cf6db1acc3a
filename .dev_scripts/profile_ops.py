"""Where the time of an inference or a training step goes, by operator.

    python .dev_scripts/profile_ops.py --arch base --size 800x1216 [--train]

Prints milliseconds of `plain`, `default` and `deployed` (see benchmark.py),
convolutions by their kernels. The profiler costs time itself, most where
operators are many and short.
"""

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark import build
from benchmarking.steps import make_step
from benchmarking.timing import keep_heap
from lska_mm.cli import size

REPEATS = 3


def kind(event) -> str:
    """Name of an operator; of a convolution what its weights say."""
    name = event.key.split('::')[-1]
    shapes = [shape for shape in event.input_shapes if len(shape) == 4]
    if 'conv' not in name or len(shapes) < 2:
        return name
    backward = 'backward' in name
    _, channels, height, width = shapes[-1] if backward else shapes[1]
    if len(shapes) > 2 and not backward:  # fused with a sum: images, summand, weights
        _, channels, height, width = shapes[2]
    depth = 'depth-wise ' if channels == 1 else ''
    return f'{depth}{height}x{width} convolution{", gradients" if backward else ""}'


def measure(step) -> Counter:
    """Milliseconds a step, by kind of operator."""
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(REPEATS):
            step()
    times: Counter = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        times[kind(event)] += event.self_cpu_time_total / 1e3 / REPEATS
    return times


def main():
    parser = argparse.ArgumentParser(description='Profile LSKA-VAN by operator')
    parser.add_argument('--arch', default='base', choices=['tiny', 'small', 'base'])
    parser.add_argument('--kernel-size', type=int, default=23)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--size', type=size, default=(800, 1216), metavar='HEIGHTxWIDTH')
    parser.add_argument('--train', action='store_true', help='forward and backward pass')
    parser.add_argument('--top', type=int, default=12, help='operators to name')
    args = parser.parse_args()
    keep_heap()
    image = torch.rand(args.batch, 3, *args.size)
    models = build(args.arch, args.kernel_size, args.train)
    times = {
        name: measure(make_step(model.train(args.train), image, args.train, dtype=None))
        for name, model in models.items()
        if name != 'van'
    }
    names = sorted(set().union(*times.values()), key=lambda n: -max(t[n] for t in times.values()))
    print(f'| ms | {" | ".join(times)} |\n|{" --- |" * (len(times) + 1)}')
    for name in names[: args.top]:
        print(f'| {name} | {" | ".join(f"{t[name]:.1f}" for t in times.values())} |')
    rest = [sum(t[name] for name in names[args.top :]) for t in times.values()]
    print(f'| others | {" | ".join(f"{value:.1f}" for value in rest)} |')
    print(f'| all | {" | ".join(f"{sum(t.values()):.1f}" for t in times.values())} |')


if __name__ == '__main__':
    main()
