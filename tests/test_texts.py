"""What README and docs say of each other and of the repository; test_docs.py runs commands."""

import re

import pytest

from conftest import ROOT

TEXTS = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def test_every_tool_is_in_the_list():
    listed = (ROOT / 'docs/tools.md').read_text()
    tools = [path for path in (ROOT / 'tools').rglob('*.*') if path.suffix in ('.py', '.sh')]
    scripts = [
        path.name for path in tools if re.search('^(exec |if __name__)', path.read_text(), re.M)
    ]
    assert len(scripts) > 10
    assert [name for name in scripts if f'`{name}`' not in listed] == []


def test_ratios_in_the_readme_are_those_of_the_tables():
    readme = (ROOT / 'README.md').read_text()
    rows = re.findall(r'^\|.+\| (\d\.\d\d) \| (\d\.\d\d) \|', readme, re.MULTILINE)
    assert rows
    tables = (ROOT / 'docs/performance.md').read_text()
    assert not [ratio for row in rows for ratio in row if f' {ratio} ' not in tables]


def test_the_readme_leads_to_every_page():
    readme = (ROOT / 'README.md').read_text()
    pages = [path.name for path in ROOT.glob('docs/*.md')]
    assert not [page for page in pages if f'](docs/{page})' not in readme]


def test_every_config_is_in_the_model_zoo():
    zoo = (ROOT / 'docs/model_zoo.md').read_text()
    configs = [*ROOT.glob('configs/*/*.py'), *ROOT.glob('demo/*-*.py')]
    assert len(configs) > 30
    assert not [path for path in configs if f'](../{path.relative_to(ROOT)})' not in zoo]


def places(path):
    """What a link can name in a text, as GitHub derives it from the headings."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: path.name)
def test_local_links_lead_somewhere(path):
    content = path.read_text()
    links = re.findall(r'\]\(([^)]+)\)', content)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', content)
    lost = []
    for link in links:
        name, _, place = link.partition('#')
        target = path.parent / name if name else path
        found = target.exists() and (not place or place in places(target))
        if '://' not in link and not found:
            lost.append(link)
    assert not lost
