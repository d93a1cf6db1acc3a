"""What a release, its pages and the public CI promise; test_package.py builds a wheel."""

import ast
import re

import pytest
import torch
import yaml

import lska_mm
from conftest import ROOT, load_tool

CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()
CHANGELOG = (ROOT / 'CHANGELOG.md').read_text()


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    releases = re.findall(r'^## (\S+) - (\d{4}-\d\d-\d\d)$', CHANGELOG, re.MULTILINE)
    assert len(releases) > 1
    assert releases[0] == (lska_mm.__version__, str(citation['date-released']))
    assert citation['version'] == lska_mm.__version__
    assert [date for _, date in releases] == sorted([date for _, date in releases], reverse=True)


def test_what_a_release_is_built_with_is_pinned():
    lines = (ROOT / 'requirements/release.txt').read_text().splitlines()
    pins = [line for line in lines if not line.startswith('#')]
    assert [pin.split('==')[0] for pin in pins] == ['build', 'twine']


@pytest.mark.parametrize('goal', ['setup', 'lint', 'test', 'soak', 'gpu', 'release'])
def test_goals_that_contributing_names(goal, run):
    assert f'`make {goal}`' in CONTRIBUTING or f'\nmake {goal}\n' in CONTRIBUTING
    run('make', '-n', goal)


def test_files_that_contributing_names():
    links = re.findall(r'\]\(([^)#]+)\)', CONTRIBUTING)
    names = re.findall(r'`((?:lska_mm|tests|tools|demo|configs|\.dev_scripts|\.ci)/[^` ]+)`',
                       CONTRIBUTING)  # fmt: skip
    assert len(links) >= 5
    assert len(names) >= 10
    assert not [name for name in [*links, *names] if not (ROOT / name).exists()]


def test_public_ci_runs_what_a_person_runs():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    assert workflow['permissions'] == dict(contents='read')
    assert workflow['concurrency']['cancel-in-progress'] is True
    suite = workflow['jobs']['suite']
    steps = suite['steps']
    assert 'make lint' in [step.get('run') for step in steps]
    assert steps[-1]['run'] == 'nox --session "${{ matrix.session.session }}"'
    stacks = re.search(r'^STACKS = (\{.*?^\})', (ROOT / 'noxfile.py').read_text(), re.S | re.M)[1]
    versions = {version for _, version in ast.literal_eval(stacks).values()}
    actions = {
        step['uses'].split('@')[0]: step.get('with', {}) for step in steps if 'uses' in step
    }
    assert set(actions['actions/setup-python']['python-version'].split()) == versions
    assert actions['actions/cache']['path'] == '~/.cache/pip'
    assert 'restore-keys' not in actions['actions/cache']


@pytest.mark.parametrize('k', [23, 35])
def test_the_drawing_shows_the_kernels_of_the_package(k):
    draw_lska = load_tool('.dev_scripts/draw_lska.py')
    steps = draw_lska.impulse_responses(k)
    split = lska_mm.models.lska.split_kernel(k)
    taps = [int(taps.count_nonzero()) for _, taps, _ in steps]
    assert taps == [split.local, split.local, split.far, split.far]
    seen = steps[-1][-1]
    assert seen.shape == (k, k)
    assert torch.equal(seen, seen.T)
    assert seen.min() > 0
    for theme in draw_lska.THEMES:
        assert (ROOT / f'docs/images/lska_{theme}.svg').stat().st_size > 10_000
