"""The benchmark's own logic, on images too small to tell anything about speed."""

import json

import pytest


@pytest.fixture
def benchmark(run, tmp_path):
    """Run the benchmark for a moment, by default with nothing to object to."""

    def _benchmark(*more, code=0):
        words = ['--sizes', '32x64', '--seconds', 0.01, '--max-busy', 101, '--max-spread', 100]
        tool = '.dev_scripts/benchmark.py'
        return run('python', tool, *words, '--out', tmp_path, *more, code=code)

    return _benchmark


@pytest.mark.parametrize('train', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_table_json_and_plot(benchmark, tmp_path, train):
    benchmark('--kernel-sizes', 7, 11, *(['--train'] if train else []))
    rows = json.loads((tmp_path / 'benchmark.json').read_text())
    models = ['plain', 'default', 'with_cp' if train else 'deployed', 'van']
    assert [(row['kernel_size'], row['model']) for row in rows] == [
        (k, model) for k in (7, 11) for model in models
    ]
    assert all(row['ratio'] == 1 for row in rows if row['model'] == 'plain')
    assert all(row['milliseconds'] > 0 and row['faults'] >= 0 for row in rows)
    table = (tmp_path / 'benchmark.md').read_text()
    assert table.count('| tiny |') == 2 + len(rows)  # a line a kernel size, and a line a row
    assert table.startswith(f'| arch | k | batch | size | plain, ms | {" | ".join(models[1:])} |')
    assert table.count('k=11 takes') == len(models) - 1
    assert (tmp_path / 'benchmark.png').exists()


@pytest.mark.soak
def test_other_engines_and_several_runs(benchmark, tmp_path):
    benchmark('--kernel-sizes', 7, '--onnx', '--openvino', '--precisions', 'int8', '--runs', 2)
    rows = json.loads((tmp_path / 'benchmark.json').read_text())
    models = ['plain', 'default', 'deployed', 'van', 'onnx-plain', 'onnx-deployed', 'onnx-int8']
    models += ['openvino-plain', 'openvino-deployed', 'openvino-int8']
    assert [row['model'] for row in rows] == models
    assert all(row['ratios'][0] <= row['ratio'] <= row['ratios'][1] for row in rows)
    assert ' to ' in (tmp_path / 'benchmark.md').read_text()


def test_a_busy_machine_is_refused(benchmark, tmp_path):
    assert 'of the CPUs are busy' in benchmark('--max-busy', -1, code=1)
    assert not list(tmp_path.iterdir())


def test_a_busy_machine_is_fine_where_the_report_says_so(benchmark, tmp_path):
    words = ['--max-busy', -1, '--max-spread', 0, '--kernel-sizes', 7, '--busy-is-fine']
    assert 'With --busy-is-fine: others used ' in benchmark(*words)
    assert (tmp_path / 'benchmark.md').read_text().startswith('With --busy-is-fine: others used ')
    rows = json.loads((tmp_path / 'benchmark.json').read_text())
    assert all(0 <= row['busy'] <= 100 for row in rows)


@pytest.mark.soak
def test_a_wide_spread_is_refused(benchmark, tmp_path):
    """After five measurements."""
    printed = benchmark('--max-spread', 0, '--kernel-sizes', 7, code=1)
    assert printed.count('plain, tiny k=7: times vary by') == 5
    assert printed.count('Measuring again') == 4
    assert not list(tmp_path.iterdir())
