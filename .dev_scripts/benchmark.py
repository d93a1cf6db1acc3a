"""Time LSKA-VAN against the plain implementation and mmpretrain's VAN.

    python .dev_scripts/benchmark.py [--archs tiny base] [--train] --out DIR

All models run in one process, in turns, so that a change of the machine's
speed meets all of them; medians and their ratios to the plain implementation
are reported, with the share of the measured rate of matrix products that they
reach. With --runs 3 all is measured three times: the tables have the median
ratio, and the lowest and the highest. DIR takes benchmark.json, benchmark.md
and, with several kernel sizes, benchmark.png. A busy machine or a wide spread
is an error: nothing is reported. With --busy-is-fine both pass, and the report and the
JSON file say how busy the machine was.

Models: `plain`, one operator after the other (plain_lska_van.py); `default`,
`LSKAVAN` as built; `deployed`, after `switch_to_deploy()`, or in training
`with_cp`; `van`, mmpretrain's VAN of the same size, which has one kernel (21).
With --compiled also `compiled-plain` and `compiled-deployed`, by `torch.compile` with
Inductor's `freezing`, which keeps weights in the order that suits them; to compile takes
minutes. With --onnx also `onnx-plain` and `onnx-deployed`, their graphs in ONNX Runtime, with
--openvino `openvino-plain` and `openvino-deployed`; with --precisions the deployed graph
in bfloat16 (`openvino-bf16`), and quantized to 8 bits (`onnx-int8`, `openvino-int8`).

With --device cuda a GPU is measured, by a plan of its own (benchmarking/gpu.py), in
five minutes.

`faults` are pages of memory that a step fetched from the system. glibc returns
what is freed, or keeps it, depending on what the process has done before, and
by that alone a model takes once or twice as long. The benchmark tells it to
keep all; --fresh-heap does not, and shows what a young process pays.
"""

import argparse
import itertools
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.registry import MODELS
from torch import nn

from benchmarking import gpu
from benchmarking.plain_lska_van import plain_lska_van
from benchmarking.report import ARCHS, HEADER, format_row, merge, write_report
from benchmarking.steps import make_engine_step, make_step
from benchmarking.timing import (
    BusyError,
    WideSpreadError,
    add_limits,
    calmly,
    check_idle,
    keep_heap,
    matmul_rate,
    median_and_spread,
    time_all,
)
from lska_mm import LSKAVAN
from lska_mm.cli import make_parser, report_errors, size
from lska_mm.models.lska import split_kernel

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools/analysis_tools'))
from counting import multiply_adds

ENGINES = dict(onnx='onnxruntime', openvino='openvino')  # by option


def build(arch: str, kernel_size: int, train: bool) -> dict[str, nn.Module]:
    """The models to compare, by name."""
    models = dict(plain=plain_lska_van(arch, kernel_size), default=LSKAVAN(arch, kernel_size))
    if train:
        models['with_cp'] = LSKAVAN(arch, kernel_size, with_cp=True)
    else:
        models['deployed'] = LSKAVAN(arch, kernel_size).eval()
        models['deployed'].switch_to_deploy()
    try:
        import mmpretrain.models  # noqa: F401

        models['van'] = MODELS.build(dict(type='mmpretrain.VAN', arch=arch))
    except ImportError:
        print('benchmark.py: without van, mmpretrain is not installed')
    return models


def engine_rows(args: argparse.Namespace) -> dict[str, tuple[str, str, str]]:
    """Engine, precision and model of each row that is asked for beside PyTorch's."""
    rows = {}
    for option in filter(vars(args).get, ENGINES):
        engine = ENGINES[option]
        rows[f'{option}-plain'] = engine, 'f32', 'plain'
        rows[f'{option}-deployed'] = engine, 'f32', 'deployed'
        for precision in args.precisions:
            if (engine, precision) != ('onnxruntime', 'bf16'):  # which has none on a CPU
                rows[f'{option}-{precision}'] = engine, precision, 'deployed'
    return rows


def measure(args: argparse.Namespace, arch: str, kernel_size: int, batch: int, size) -> list[dict]:
    """A row for each model.

    Raises:
        WideSpreadError: Names the model.
    """
    image = torch.rand(batch, 3, *size)
    models = build(arch, kernel_size, args.train)
    steps, dtype = {}, torch.bfloat16 if args.amp else None
    for name, model in models.items():
        model.train(args.train)
        steps[name] = make_step(model, image, args.train, dtype)
    if args.compiled:
        for name in ('plain', 'deployed'):
            model = models[f'compiled-{name}'] = models[name]
            run = torch.compile(model, options=dict(freezing=True))
            steps[f'compiled-{name}'] = make_step(model, image, False, dtype, run)
    for name, (engine, precision, graph) in engine_rows(args).items():
        steps[name] = make_engine_step(engine, precision, models[graph], image)
        models[name] = models[graph]
    rate = matmul_rate()
    times, faults = time_all(steps, args.seconds)
    passes = 3 if args.train else 1  # a backward pass costs two forward ones
    rows = []
    for name, values in times.items():
        median, spread = median_and_spread(
            f'{name}, {arch} k={kernel_size}', values, args.max_spread
        )
        work = passes * multiply_adds(models[name], image) / 1e6
        rows.append(
            dict(
                arch=arch, kernel_size=kernel_size, batch=batch, height=size[0], width=size[1],
                model=name, milliseconds=median, spread=spread,
                ratio=statistics.median(times['plain']) / median,
                share=work / median / rate, faults=round(statistics.median(faults[name])),
            )
        )  # fmt: skip
    print('\n'.join(map(format_row, rows)), flush=True)
    return rows


@report_errors(BusyError, ImportError, OSError, ValueError, WideSpreadError)
def main() -> None:
    parser = make_parser('Time LSKA-VAN against its peers')
    parser.add_argument('--archs', nargs='+', default=['tiny'], choices=ARCHS)
    parser.add_argument('--kernel-sizes', nargs='+', type=int, default=[7, 23, 53])
    parser.add_argument('--batches', nargs='+', type=int, default=[1])
    parser.add_argument('--sizes', nargs='+', type=size, default=[(224, 224)],
                        metavar='HEIGHTxWIDTH')  # fmt: skip
    parser.add_argument('--train', action='store_true', help='forward and backward pass')
    parser.add_argument('--compiled', action='store_true', help='torch.compile too; on a CPU')
    parser.add_argument('--onnx', action='store_true', help='ONNX Runtime too; likewise')
    parser.add_argument('--openvino', action='store_true', help='OpenVINO too; likewise')
    parser.add_argument('--precisions', nargs='+', choices=['bf16', 'int8'], default=[],
                        help='of the engines, beside f32')  # fmt: skip
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--seconds', type=float, help='for each combination, by default 10; on a '
                        'GPU for all of its plan, 270')  # fmt: skip
    parser.add_argument('--runs', type=int, default=1, help='repetitions of everything')
    add_limits(parser)
    parser.add_argument('--fresh-heap', action='store_true', help='see faults, above')
    parser.add_argument('--out', type=Path, required=True, help='folder for table and plot')
    args = parser.parse_args()
    if (args.compiled or args.onnx or args.openvino) and (args.train or args.device != 'cpu'):
        parser.error('--compiled, --onnx and --openvino are for inference on a CPU')
    if args.precisions and not (args.onnx or args.openvino):
        parser.error('--precisions are of the engines: give --onnx or --openvino, too')
    for option, package in ENGINES.items():
        if getattr(args, option) and find_spec(package) is None:
            raise ImportError(f'--{option} needs {package}: pip install {package}')
    for k in args.kernel_sizes:  # an invalid one is named before minutes of work
        split_kernel(k)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == 'cuda':
        if not torch.cuda.is_available():
            parser.error('--device cuda needs a GPU, torch sees none')
        print(
            f'{gpu.run(build, args.out, args.seconds or 270)}\nwritten to {args.out}/benchmark.*'
        )
        return
    args.seconds = args.seconds or 10
    state = check_idle(args)
    print(f'CPU, torch {torch.__version__}, {torch.get_num_threads()} threads')
    if not args.fresh_heap:
        keep_heap()
    print(HEADER)
    combinations = list(itertools.product(args.archs, args.kernel_sizes, args.batches, args.sizes))
    runs = [
        [row | state for places in combinations for row in calmly(measure, args, *places)]
        for _ in range(args.runs)
    ]
    print(f'\n{write_report(merge(runs), args.out)}\nwritten to {args.out}/benchmark.*')


if __name__ == '__main__':
    sys.exit(main())
