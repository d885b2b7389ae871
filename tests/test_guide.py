"""The README and the guide: their Python runs, their figures are those of the records, and their links exist."""

import ast
import collections
import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest

import branchy_jax as bj

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
FOLDERS = [path for path in DOCS.iterdir() if path.is_dir() and path.name[0] not in '._' and path.name != 'api']
PATHS = [ROOT / 'README.md', *DOCS.glob('*.md'), *(path for folder in FOLDERS for path in folder.glob('*.md'))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(PATHS)}
FENCE = re.compile(r'^(`{3,})(\{[\w-]+\}|\w*)([^\n]*)\n(.*?)^\1$', re.S | re.M)


def blocks(text, kind):
    """Yields ``(number of the line before, text)`` of each fenced block of a kind."""
    for match in FENCE.finditer(text):
        if match[2].strip('{}') == kind:
            yield text[: match.start(4)].count('\n'), match[4]


def prose(text):
    """Returns a page without its fenced blocks, which may hold what looks like links."""
    return FENCE.sub('', text)


WITH_PYTHON = [name for name, text in PAGES.items() if any(blocks(text, 'python'))]


@pytest.mark.slow
@pytest.mark.parametrize('name', WITH_PYTHON)
@pytest.mark.usefixtures('few_digits')
def test_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples write files
    namespace = {'__name__': name}
    for line, block in blocks(PAGES[name], 'python'):
        block = '\n' * line + block.replace(
            'epochs=4', 'epochs=1'
        )  # errors name the line of the page; the README trains
        exec(compile(block, ROOT / name, 'exec'), namespace)


def public_names(module, prefix='branchy_jax'):
    """Yields the full name of every public name of a package and of the packages within."""
    body = ast.parse(inspect.getsource(module)).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [alias.name for alias in imports if alias.asname == alias.name]
    for name in getattr(module, '__all__', [name for name in names if not name.startswith('_')]):
        value, full = getattr(module, name), f'{prefix}.{name}'
        assert value.__doc__, full
        yield from public_names(value, full) if isinstance(value, types.ModuleType) else [full]


def load_generate():
    spec = importlib.util.spec_from_file_location('generate', DOCS / 'generate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    """The tables of results are those of the stored records; every file is in the tree."""
    generate = load_generate()
    for page in ('README.md', 'docs/results.md'):
        assert generate.filled(page) == PAGES[page], 'run "python docs/generate.py"'
    tree = PAGES['docs/api.md'].partition('<!-- python docs/generate.py -->')[2]
    listed = re.findall(r'^ *(\w+\.py|\w+/)', tree, re.M)
    files = [*(ROOT / 'branchy_jax').rglob('*.py'), *(ROOT / 'experiments').rglob('*.py')]
    names = [f'{path.parent.name}/' if path.name == '__init__.py' else path.name for path in files]
    assert sorted(listed) == sorted(names), 'run "python docs/generate.py"'


def test_api_pages_document_every_public_name_once():
    text = '\n'.join(load_generate().api_pages().values())
    documented = re.findall(r'^\.\. auto(?:function|class|data):: (\S+)$', text, re.M)
    assert collections.Counter(documented) == collections.Counter(public_names(bj))


def anchors(text):
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r'^#+ (.*)$', prose(text), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', PAGES)
def test_links_names_and_commands_exist(name):
    text, page = PAGES[name], ROOT / name
    for link in [*re.findall(r'\]\(<?([^)>]+)>?\)', prose(text)), *re.findall(r'^`{3}\{include\} (.*)$', text, re.M)]:
        path, _, anchor = link.partition('#')
        if not re.match(r'\w+:', path):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
    for names in re.findall(r'`bj((?:\.\w+)+)(?:\(.*?\))?`', prose(text)):
        value = bj
        for part in names.split('.')[1:]:
            value = getattr(value, part)
    for module in re.findall(r'python -m (experiments[.\w]*)', text):
        path = ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').is_file() or (path / '__main__.py').is_file(), module
    scripts = re.findall(r'(?:bash|python) ((?:experiments|docs|tests)/\S+?\.(?:sh|py))', text)
    for path in [*scripts, *re.findall(r'--config=([\w/]+\.py)', text)]:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize('name', PAGES)
def test_measured_figures_are_in_a_generated_table_or_have_a_date(name):
    by_hand = re.sub(r'<!-- python docs/generate.py -->.*?<!-- end -->', '', prose(PAGES[name]), flags=re.S)
    for paragraph in by_hand.split('\n\n'):
        measured = re.search(r'\d\.\d+ ?(%|ms|GB|MB|times|seconds|points|of the time)', paragraph)
        assert not measured or re.search(r'20\d\d-\d\d-\d\d', paragraph), paragraph


def test_every_page_is_in_a_toctree_once_and_every_stored_report_is_shown():
    listed, shown = ['docs/index.md', 'README.md'], set()
    for name, text in PAGES.items():
        toctrees = ''.join(block for _, block in blocks(text, 'toctree'))
        children = [line for line in toctrees.splitlines() if line and line[0] != ':' and '*' not in line]
        listed += [f'{(Path(name).parent / child.strip()).with_suffix("")}.md' for child in children]
        shown |= {
            (ROOT / name).parent.joinpath(path).resolve() for path in re.findall(r'\{include\} (.*)$', text, re.M)
        }
    assert sorted(listed) == sorted(PAGES)
    assert set((ROOT / 'experiments' / 'results').glob('*/*.md')) <= shown
