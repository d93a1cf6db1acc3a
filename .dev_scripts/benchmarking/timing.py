"""Time steps on a CPU that nobody else uses."""

import argparse
import ctypes
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 4  # steps of a model at least, however long they take
TRIES = 5  # measurements of a combination until its times vary less
SIDE = 2048  # of the matrices whose product tells the machine's rate
PAUSE = 0.005  # seconds in which the threads of the model before stop waiting for more work


def time_once(step: Callable[[], None]) -> float:
    """Milliseconds of one step."""
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def page_faults() -> int:
    """Pages that this process has fetched from the system so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_heap() -> None:
    """Tell glibc to take all memory from its heap and to return none of it."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside the heap


def time_all(steps: dict, seconds: float) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Milliseconds and page faults of many steps of each, in turns."""
    for step in steps.values():  # warm up
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    faults: dict[str, list[int]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < ROUNDS:
        for name, step in steps.items():
            time.sleep(PAUSE)
            before = page_faults()
            times[name].append(time_once(step))
            faults[name].append(page_faults() - before)
    return times, faults


def matmul_rate() -> float:
    """Multiply-adds a second of a large matrix product, in G."""
    a = torch.rand(SIDE, SIDE)
    return SIDE**3 / 1e6 / min(time_once(lambda: a @ a) for _ in range(7))


class WideSpreadError(RuntimeError):
    """Times vary too much to be reported."""


class BusyError(RuntimeError):
    """Others use the machine."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say when a measurement is not one."""
    parser.add_argument('--max-busy', type=float, default=10, metavar='PERCENT',
                        help='of the machine that others may use')  # fmt: skip
    parser.add_argument('--max-spread', type=float, default=0.15, metavar='SHARE',
                        help='half the interquartile range over the median')  # fmt: skip
    parser.add_argument('--busy-is-fine', action='store_true',
                        help='measure without these limits; the report says so')  # fmt: skip


def check_idle(args: argparse.Namespace) -> dict[str, float]:
    """Look at the machine for two seconds; lift the limits of `add_limits` if asked to.

    Returns:
        What a row has of that: nothing, or with --busy-is-fine the per cent that others use.

    Raises:
        BusyError: If others use more than ``args.max_busy`` per cent of it.
    """
    import psutil

    busy = psutil.cpu_percent(interval=2)
    if args.busy_is_fine:
        args.max_spread = math.inf
        return dict(busy=busy)
    if busy > args.max_busy:
        raise BusyError(
            f'{busy:.0f} % of the CPUs are busy; let nothing else run, or give --busy-is-fine.'
        )
    return {}


def median_and_spread(name: str, values: list[float], limit: float) -> tuple[float, float]:
    """Return the median, and half the interquartile range over it.

    Raises:
        WideSpreadError: If the spread is more than ``limit``; calls the values ``name``.
    """
    low, median, high = statistics.quantiles(values, n=4)
    spread = (high - low) / 2 / median
    if spread > limit:
        raise WideSpreadError(
            f'{name}: times vary by {spread:.0%} around the median, more than {limit:.0%}.'
        )
    return median, spread


def calmly(measure: Callable, *args: Any) -> Any:
    """``measure(*args)``, again if times vary too much, at most TRIES times.

    Raises:
        WideSpreadError: If they vary too much each time.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return measure(*args)
        except WideSpreadError as error:
            if attempt == TRIES:
                raise WideSpreadError(
                    f'{error} Let nothing else run, or give --busy-is-fine.'
                ) from None
            print(f'benchmark.py: {error} Measuring again.', file=sys.stderr)
    raise AssertionError
