"""The benchmark on a GPU: what is measured there, and how.

Everything is in one process and in turns, as on a CPU. Graphs are of whole steps,
captured by PyTorch; compiled models are those of `torch.compile` with its defaults.
Combinations come in the order of their weight, and those for which the time is not
enough are named.
"""

import functools
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarking.gpu_report import kind, plot, profile_table, table
from benchmarking.paper import least_milliseconds, operators
from benchmarking.steps import make_step

TURNS = 7  # steps of each model, in turns
WARM_UP = 3
LAYOUTS = dict(NCHW=torch.contiguous_format, channels_last=torch.channels_last)
TYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


class Case(NamedTuple):
    """A combination to measure."""

    arch: str
    kernel_size: int
    batch: int
    size: tuple[int, int]
    precision: str
    layout: str
    train: bool
    compiled: bool = False  # compiled models beside the others


MANY, LARGE, MOST, ONE = (32, (224, 224)), (2, (800, 1216)), (128, (224, 224)), (1, (224, 224))
ARCHS = ('tiny', 'base')


def plan() -> Iterator[Case]:
    """List what is measured, the most telling first."""
    modes, layouts = (True, False), tuple(LAYOUTS)
    for arch, train, shape, layout in itertools.product(
        ARCHS, modes, (MANY, LARGE, MOST), layouts
    ):
        yield Case(arch, 23, *shape, 'bf16', layout, train)
    for train in modes:
        yield Case('tiny', 23, *MANY, 'bf16', 'NCHW', train, compiled=True)
    for arch, layout in itertools.product(ARCHS, layouts):
        yield Case(arch, 23, *ONE, 'bf16', layout, False)
    for precision, arch, train in itertools.product(('fp32', 'fp16'), ARCHS, modes):
        yield Case(arch, 23, *MANY, precision, 'channels_last', train)
    for k, arch, train in itertools.product((53, 7), ARCHS, modes):
        yield Case(arch, k, *MANY, 'bf16', 'channels_last', train)
    for train in modes:
        yield Case('base', 23, *MANY, 'bf16', 'NCHW', train, compiled=True)


class Device:
    """A GPU, or for tests a CPU: its clock, graphs, compiler and rates."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.is_gpu = self.device.type == 'cuda'
        types = TYPES if self.is_gpu else {'fp32': torch.float32, 'bf16': torch.bfloat16}
        self.rates = {key: self._matmul_rate(dtype) for key, dtype in types.items()}
        self.copy_rate = self._copy_rate()

    def milliseconds(self, step: Callable[[], Any]) -> float:
        """Time of one step."""
        if not self.is_gpu:
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _matmul_rate(self, dtype: torch.dtype) -> float:
        side = 8192 if self.is_gpu else 256
        a = torch.rand(side, side, device=self.device).to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions may, by default
        fastest = min(self.milliseconds(lambda: a @ a) for _ in range(5))
        torch.backends.cuda.matmul.allow_tf32 = False
        return side**3 / 1e-3 / fastest

    def _copy_rate(self) -> float:
        a = torch.empty(2**28 if self.is_gpu else 2**20, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return 2 * len(a) / 1e-3 / min(self.milliseconds(lambda: b.copy_(a)) for _ in range(5))

    def capture(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Make a CUDA graph of a step."""
        if not self.is_gpu:
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()
        return lambda: (graph.replay(), kept)

    def compile(self, model: nn.Module) -> Callable:
        """Compile a model for one size of images."""
        how = dict(dynamic=False) if self.is_gpu else dict(backend='eager')
        return torch.compile(model, **how)

    def profile(self, step: Callable[[], Any]) -> Counter:
        """Milliseconds and number of kernels of a step, by kind."""
        from torch.profiler import ProfilerActivity, profile

        step()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
        with profile(activities=activities) as p:
            step()
            if self.is_gpu:
                torch.cuda.synchronize()
        found: Counter = Counter()
        for event in p.events():
            if not self.is_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
                found[kind(event.name), 'ms'] += event.time_range.elapsed_us() / 1e3
                found[kind(event.name), 'kernels'] += 1
        return found


def make_images(case: Case, device: Device) -> torch.Tensor:
    """Images of a case, in its layout."""
    images = torch.rand(case.batch, 3, *case.size, device=device.device)
    return images.contiguous(memory_format=LAYOUTS[case.layout])


def measure(case: Case, models: dict[str, nn.Module], device: Device) -> list[dict]:
    """A row for each model: milliseconds, ratio to the plain one, memory; the default's limit."""
    images = make_images(case, device)
    dtype = None if case.precision == 'fp32' else TYPES[case.precision]
    steps = {}
    for name, model in models.items():
        model.to(device.device, memory_format=LAYOUTS[case.layout])
        model.train(case.train)
        steps[name] = make_step(model, images, case.train, dtype)
    for name in [name for name in steps if name not in ('van', 'with_cp')]:
        steps[f'{name} graph'] = device.capture(steps[name])
        if case.compiled:
            torch.compiler.reset()
            run = device.compile(models[name])
            step = make_step(models[name], images, case.train, dtype, run)
            for _ in range(WARM_UP):
                step()
            steps[f'{name} compiled'] = step
            steps[f'{name} compiled graph'] = device.capture(step)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            times[name].append(device.milliseconds(step))
    plain = statistics.median(times['plain'])
    limit, kernels = paper(models['default'], images.to(TYPES[case.precision]), case, device)
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(
            dict(
                arch=case.arch, kernel_size=case.kernel_size, batch=case.batch,
                height=case.size[0], width=case.size[1], precision=case.precision,
                layout=case.layout, train=case.train, model=name, milliseconds=median,
                spread=(high - low) / 2 / median, ratio=plain / median, limit=limit,
                share=limit / median, kernels=kernels,
                memory=None if 'graph' in name else peak(steps[name], device),
            )
        )  # fmt: skip
    return rows


def paper(model: nn.Module, images: torch.Tensor, case: Case, device: Device) -> tuple:
    """Milliseconds of the limit of a model, and its number of kernels."""
    if case.train and torch.__version__.startswith('2.1.'):
        return math.nan, 0  # it cannot recompute on the meta device
    found = operators(model, images, case.train)
    return least_milliseconds(found, device.copy_rate, device.rates[case.precision]), len(found)


def peak(step: Callable[[], Any], device: Device) -> float | None:
    """MiB on the GPU during a step, beside what lies there anyway."""
    if not device.is_gpu:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def run(build: Callable, out: Path, seconds: float, name: str = 'cuda', cases: Any = None) -> str:
    """Measure, and write benchmark.json, benchmark.md and benchmark.png into ``out``.

    Args:
        build: From arch, kernel size and whether to train to models by name.
        out: Folder for the files.
        seconds: After these, what is left of the plan is named, not measured.
        name: Device.
        cases: `Case`s instead of `plan`.

    Returns:
        What benchmark.md holds.
    """
    begin, device = time.perf_counter(), Device(name)
    rows, left, profiles = [], [], {}
    build = functools.lru_cache(maxsize=1)(build)
    gpu = torch.cuda.get_device_name() if device.is_gpu else 'CPU'
    rates = ', '.join(f'{key} {rate / 1e12:.1f}' for key, rate in device.rates.items())
    machine = (
        f'{gpu}, torch {torch.__version__}, TF32 in convolutions; copies '
        f'{device.copy_rate / 1e12:.2f} TB/s, matrix products, 1e12 multiply-adds/s: {rates}'
    )

    def save() -> None:
        kept = {key: {' '.join(k): v for k, v in c.items()} for key, c in profiles.items()}
        content = dict(
            machine=machine, rows=rows, profiles=kept, left_out=[case._asdict() for case in left]
        )
        (out / 'benchmark.json').write_text(json.dumps(content, indent=1))

    for case in cases or plan():
        if time.perf_counter() - begin > seconds:
            left.append(case)
            continue
        models = build(case.arch, case.kernel_size, case.train)
        try:
            found = measure(case, models, device)
        except RuntimeError as error:  # of the compiler, a capture, or memory: the others go on
            print(f'{case}: {type(error).__name__}: {str(error)[:300]}', flush=True)
            left.append(case)
            continue
        rows += found
        print(table(found), flush=True)
        usual = case[1:5] == (23, *MANY, 'bf16') and not case.compiled
        if usual and case.train:
            images = make_images(case, device)
            for key in ('plain', 'default'):
                step = make_step(models[key], images, case.train, TYPES[case.precision])
                profiles[f'{key}, {case.arch}, {case.layout}'] = device.profile(step)
        save()  # what is measured, whatever ends the process
    save()
    head = f'{machine}; {len(left)} combinations left out'
    text = '\n\n'.join([head, table(rows), *([profile_table(profiles)] if profiles else [])])
    (out / 'benchmark.md').write_text(f'{text}\n')
    plot(rows, out / 'benchmark.png')
    return text
