"""The guide says what is: its Python runs, its API pages hold every public name once, its links lead somewhere."""

import ast
import collections
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
    if path.parts[-2][0] not in '._'
}
TUTORIALS = {name: text for name, text in PAGES.items() if text.startswith('---\n')}
FENCE = re.compile(r'^(`{3,})(\{[\w-]+\}|\w*)([^\n]*)\n(.*?)^\1$', re.S | re.M)


def blocks(text, kind):
    """Yields ``(number of the line before, text)`` of each fenced block of a kind."""
    for found in FENCE.finditer(text):
        if found[2].strip('{}') == kind:
            yield text[: found.start(4)].count('\n'), found[4]


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
    kinds = {found[2] for text in PAGES.values() for found in FENCE.finditer(text)}
    assert kinds <= {
        'python',
        'bash',
        'text',
        'bibtex',
        '{code-cell}',
        '{toctree}',
        '{include}',
        '{eval-rst}',
        '{note}',
    }


def public_names(module):
    """Returns what a room offers: its ``__all__``, or what its file defines and describes."""
    if hasattr(module, '__all__'):
        return set(module.__all__)
    body = ast.parse(inspect.getsource(module)).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node, after in itertools.pairwise(body):
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.Assign) and described:
            found |= {target.id for target in node.targets}
    return {name for name in found if not name.startswith('_')}


def all_public_names(module=bj, place='branchy_jax'):
    """Yields every public name of a room and of the rooms within, by the place where a user finds it."""
    for name in public_names(module):
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from all_public_names(value, f'{place}.{name}')
        else:
            yield f'{place}.{name}'


def test_api_pages_hold_every_public_name_once():
    text = '\n'.join(text for name, text in PAGES.items() if name.startswith('api/'))
    described = re.findall(r'^\.\. auto(?:function|class|data):: (\S+)$', text, re.M)
    assert collections.Counter(described) == collections.Counter(all_public_names())


def test_every_room_has_a_page():
    titles = '\n'.join(text for name, text in PAGES.items() if name.startswith('api/'))
    rooms = {place.rsplit('.', 1)[0] for place in all_public_names()}
    assert rooms == set(re.findall(r'^\.\. py:module:: (\S+)$', titles, re.M))


@pytest.mark.parametrize('name', PAGES)
def test_names_in_inline_code_exist(name):
    for code in re.findall(r'`([^`\n]+)`', prose(PAGES[name])):
        found = re.fullmatch(r'bj((?:\.\w+)+)(\(.*\))?', code)
        if found is not None:
            value = bj
            for part in found[1].split('.')[1:]:
                value = getattr(value, part)


def anchors(text):
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r'^#+ (.*)$', prose(text), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    page = DOCS / name
    links = re.findall(r'\]\(<?([^)>]+)>?\)', prose(PAGES[name]))
    includes = re.findall(r'^`{3}\{include\} (.*)$', PAGES[name], re.M)
    for link in [*links, *includes]:
        path, _, anchor = link.partition('#')
        if re.match(r'\w+:', path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        # Sphinx finds no page outside the guide; of another kind, a file is handed on as it is.
        assert link in includes or target.suffix != '.md' or DOCS in target.parents, link
        assert not anchor or anchor in anchors(target.read_text()), link


def children(name):
    """Returns the pages that the toctrees of a page name, in order."""
    lines = '\n'.join(block for _, block in blocks(PAGES[name], 'toctree')).splitlines()
    within = [line.strip() for line in lines if line.strip() and not line.startswith(':')]
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


def test_the_guide_needs_no_pages_that_are_not_there():
    """The scripts of the guide name files; all of them exist."""
    for script in [*DOCS.glob('*.sh'), *DOCS.glob('*/*.sh')]:
        for path in re.findall(r'docs/[\w/]+\.(?:sh|py|txt|md)\b', script.read_text()):
            assert (ROOT / path).is_file(), f'{script.name}: {path}'
