"""The benchmark's own logic, on images too small to tell anything about speed."""

import json

import pytest

import benchmark


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Run the benchmark for a moment, by default with nothing to object to."""
    monkeypatch.setattr(benchmark, 'BUSY', 101)
    monkeypatch.setattr(benchmark, 'SPREAD', 100)
    monkeypatch.setattr(benchmark, 'SIDE', 256)

    def _main(*more):
        command = ['benchmark.py', '--sizes', '32x64', '--seconds', '0.01', '--out', str(tmp_path)]
        monkeypatch.setattr('sys.argv', [*command, *more])
        return benchmark.main()

    return _main


@pytest.mark.parametrize('train', [False, True])
def test_table_json_and_plot(main, tmp_path, train):
    assert main('--kernel-sizes', '7', '11', *(['--train'] if train else [])) == 0
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


def test_onnx_and_several_runs(main, tmp_path):
    assert main('--kernel-sizes', '7', '--onnx', '--runs', '2') == 0
    rows = json.loads((tmp_path / 'benchmark.json').read_text())
    models = ['plain', 'default', 'deployed', 'van', 'onnx-plain', 'onnx-deployed']
    assert [row['model'] for row in rows] == models
    assert all(row['ratios'][0] <= row['ratio'] <= row['ratios'][1] for row in rows)
    assert ' to ' in (tmp_path / 'benchmark.md').read_text()


def test_onnx_in_training_is_refused(main, capsys):
    with pytest.raises(SystemExit, match='2'):
        main('--onnx', '--train')
    assert '--onnx is for inference on a CPU' in capsys.readouterr().err


def test_a_busy_machine_is_refused(main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, 'BUSY', -1)
    assert main() == 1
    assert 'of the CPUs are busy' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wide_spread_is_refused(main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, 'SPREAD', 0)
    monkeypatch.setattr(benchmark, 'TRIES', 3)
    assert main() == 1
    errors = capsys.readouterr().err
    assert errors.count('plain, tiny k=7: times vary by') == benchmark.TRIES
    assert errors.count('Measuring again') == benchmark.TRIES - 1
    assert not list(tmp_path.iterdir())
