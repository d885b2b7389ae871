"""The Python of the guide runs, its API pages document every public name once, and its links exist."""

import ast
import collections
import importlib.util
import inspect
import itertools
import re
import types
from pathlib import Path

import pytest

import branchy_jax as bj

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.glob('*.md'))} | {
    str(path.relative_to(DOCS)): path.read_text()
    for path in sorted(DOCS.glob('*/*.md'))
    if path.parts[-2][0] not in '._' and path.parts[-2] != 'api'  # a build generates the pages of the API
}
TUTORIALS = {name: text for name, text in PAGES.items() if text.startswith('---\n')}
README = (ROOT / 'README.md').read_text()
FENCE = re.compile(r'^(`{3,})(\{[\w-]+\}|\w*)([^\n]*)\n(.*?)^\1$', re.S | re.M)


def blocks(text, kind):
    """Yields ``(number of the line before, text)`` of each fenced block of a kind."""
    for match in FENCE.finditer(text):
        if match[2].strip('{}') == kind:
            yield text[: match.start(4)].count('\n'), match[4]


def prose(text):
    """Returns a page without its fenced blocks, which may hold what looks like links."""
    return FENCE.sub('', text)


@pytest.mark.parametrize('name', [name for name, text in PAGES.items() if any(blocks(text, 'python'))])
@pytest.mark.usefixtures('few_digits')
def test_python_of_a_page_runs(name):
    namespace = {'__name__': name}
    for line, block in blocks(PAGES[name], 'python'):
        exec(compile('\n' * line + block, DOCS / name, 'exec'), namespace)  # errors name the line of the page


def test_no_python_hides_behind_another_name():
    kinds = {match[2] for text in PAGES.values() for match in FENCE.finditer(text)}
    sphinx = {'{code-cell}', '{toctree}', '{include}', '{eval-rst}', '{note}'}
    assert kinds <= {'python', 'bash', 'text', 'bibtex'} | sphinx


def public_names(module):
    """Returns the public names of a module: its ``__all__``, or what its file defines or imports by the same name."""
    if hasattr(module, '__all__'):
        return set(module.__all__)
    body = ast.parse(inspect.getsource(module)).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names |= {alias.name for alias in imports if alias.asname == alias.name}
    for node, after in itertools.pairwise(body):
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.Assign) and described:
            names |= {target.id for target in node.targets}
    return {name for name in names if not name.startswith('_')}


def all_public_names(module=bj, prefix='branchy_jax'):
    """Yields the full name of every public name of a package and of the packages within."""
    for name in public_names(module):
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from all_public_names(value, f'{prefix}.{name}')
        else:
            yield f'{prefix}.{name}'


def load_generate():
    spec = importlib.util.spec_from_file_location('generate', DOCS / 'generate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    generate = load_generate()
    for page in ('README.md', 'docs/results.md'):
        assert generate.filled(page) == (ROOT / page).read_text(), 'run "python docs/generate.py"'
    tree = (DOCS / 'api.md').read_text().partition('<!-- python docs/generate.py -->')[2]
    listed = re.findall(r'^ *(\w+\.py|\w+/)', tree, re.M)
    files = [*(ROOT / 'branchy_jax').rglob('*.py'), *(ROOT / 'experiments').rglob('*.py')]
    names = [f'{path.parent.name}/' if path.name == '__init__.py' else path.name for path in files]
    assert sorted(listed) == sorted(names), 'run "python docs/generate.py"'


def test_api_pages_document_every_public_name_once():
    text = '\n'.join(load_generate().api_pages().values())
    documented = re.findall(r'^\.\. auto(?:function|class|data):: (\S+)$', text, re.M)
    assert collections.Counter(documented) == collections.Counter(all_public_names())


@pytest.mark.parametrize('name', PAGES)
def test_names_in_inline_code_exist(name):
    for code in re.findall(r'`([^`\n]+)`', prose(PAGES[name])):
        match = re.fullmatch(r'bj((?:\.\w+)+)(\(.*\))?', code)
        if match is not None:
            value = bj
            for part in match[1].split('.')[1:]:
                value = getattr(value, part)


def anchors(text):
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r'^#+ (.*)$', prose(text), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', PAGES)
def test_links_exist(name):
    page = DOCS / name
    links = re.findall(r'\]\(<?([^)>]+)>?\)', prose(PAGES[name]))
    includes = re.findall(r'^`{3}\{include\} (.*)$', PAGES[name], re.M)
    for link in [*links, *includes]:
        path, _, anchor = link.partition('#')
        if re.match(r'\w+:', path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        # Sphinx knows no page outside the guide, and copies files of other kinds.
        assert link in includes or target.suffix != '.md' or DOCS in target.parents, link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize('text', [*PAGES.values(), README], ids=[*PAGES, 'README.md'])
def test_commands_exist(text):
    for module in re.findall(r'python -m (experiments[.\w]*)', text):
        path = ROOT / module.replace('.', '/')
        assert path.with_suffix('.py').is_file() or (path / '__main__.py').is_file(), module
    scripts = re.findall(r'(?:bash|python) ((?:experiments|docs|tests)/\S+?\.(?:sh|py))', text)
    for path in [*scripts, *re.findall(r'--config=([\w/]+\.py)', text)]:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize('text', [*PAGES.values(), README], ids=[*PAGES, 'README.md'])
def test_measured_figures_are_in_a_generated_table_or_have_a_date(text):
    written_by_hand = re.sub(r'<!-- python docs/generate.py -->.*?<!-- end -->', '', prose(text), flags=re.S)
    for paragraph in written_by_hand.split('\n\n'):
        measured = re.search(r'\d\.\d+ ?(%|ms|GB|MB|times|seconds|points|of the time)', paragraph)
        assert not measured or re.search(r'20\d\d-\d\d-\d\d', paragraph), paragraph


def children(name):
    """Returns the pages that the toctrees of a page name, in order."""
    lines = '\n'.join(block for _, block in blocks(PAGES[name], 'toctree')).splitlines()
    within = [line.strip() for line in lines if line.strip() and not line.startswith(':') and '*' not in line]
    return [str((Path(name).parent / child).with_suffix('.md')) for child in within]


def test_every_page_is_in_a_toctree_once():
    listed = [child for name in PAGES for child in children(name)]
    assert sorted([*listed, 'index.md']) == sorted(PAGES)
    reached, waiting = set(), ['index.md']
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += children(name)
    assert reached == set(PAGES)
    assert len(PAGES) >= 20


def test_every_stored_report_is_shown():
    stored = set((ROOT / 'experiments' / 'results').glob('*/*.md'))
    shown = {
        (DOCS / name).parent.joinpath(path).resolve()
        for name, text in PAGES.items()
        for path in re.findall(r'^`{3}\{include\} (.*)$', text, re.M)
    }
    assert stored <= shown


def test_tutorials_are_five_notebooks_that_end_with_a_picture():
    assert len(TUTORIALS) == 5
    for name, text in TUTORIALS.items():
        assert 'format_name: myst' in text
        cells = [cell for _, cell in blocks(text, 'code-cell')]
        for cell in cells:
            ast.parse(cell)
        assert re.search(r'bj\.plots\.|plt\.|axes\.', cells[-1]), name
        assert not any(blocks(text, 'output'))


def test_files_that_scripts_name_exist():
    for script in [*DOCS.glob('*.sh'), *DOCS.glob('*/*.sh')]:
        for path in re.findall(r'docs/[\w/]+\.(?:sh|py|txt|md)\b', script.read_text()):
            assert (ROOT / path).is_file(), f'{script.name}: {path}'
