"""How Sphinx builds the guide: Markdown pages, notebooks, API pages made from docstrings.

Two extensions are our own: inline code such as ``bj.inference.plan`` becomes a link to its
entry, and formulas become MathML, which browsers show without a script. `generate.py`
writes the API pages and the tables of results.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import branchy_jax as bj
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

project = 'branchy_jax'
release = bj.__version__
language = 'en'
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton', 'myst_nb']
exclude_patterns = ['_build', '.venv', 'requirements.txt']

html_theme = 'furo'
html_title = 'branchy_jax'
html_static_path = ['_static']
html_css_files = ['guide.css']
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = 'mathml'
pygments_style = 'friendly'

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'cache'  # pages whose code has not changed show stored outputs
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True  # what is printed epoch by epoch stays together

# Single backticks in docstrings name things. Ours must exist, and are linked.
default_role = 'py:obj'
nitpicky = True
nitpick_ignore_regex = [
    ('py:.*', r'(?!branchy_jax\.).*'),
    ('py:class', r'branchy_jax\..*'),  # annotations name types that are not public
]
add_module_names = False
autodoc_default_options = {
    'members': True,
    'member-order': 'bysource',
    'special-members': '__call__',
    'exclude-members': 'replace, parent, name, scope, metric',
}
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
napoleon_use_rtype = False
toc_object_entries_show_parents = 'hide'


_NOT_LINKED = nodes.title | nodes.reference | addnodes.pending_xref


def _ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    while (node := node.parent) is not None:
        yield node


class LinkCode(SphinxTransform):
    """Links inline code that names what is public, ``bj.…``; a wrong name fails a build."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Replaces the literals of a page."""
        if self.env.docname == 'about/changelog':  # which has names of earlier versions
            return
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(r'bj((?:\.\w+)+)(\(.*\))?', literal.astext())
            if match is None or any(
                isinstance(node, _NOT_LINKED) for node in _ancestors(literal)
            ):
                continue
            link = addnodes.pending_xref(
                '',
                refdomain='py',
                reftype='obj',
                reftarget=f'branchy_jax{match[1]}',
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(link)
            link += literal


def public_entry(
    app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Finds the entry of a name without its package, or with the file that defines it."""
    if node.get('refdomain') != 'py':
        return None
    entries, name = env.get_domain('py').objects, node['reftarget'].rsplit('.', 1)[-1]
    named = (place for place in entries if place.rsplit('.', 1)[-1] == name)
    places = sorted(place for place in named if place.count('.') <= 2)
    if not places or not re.fullmatch(r'(branchy_jax\..*\.)?\w+', node['reftarget']):
        return None
    entry = entries[places[0]]
    return make_refnode(
        app.builder, node['refdoc'], entry.docname, entry.node_id, content, places[0]
    )


def described_where_defined(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Gives a value the description below it in the file that defines it."""
    if what != 'data':
        return
    package, _, own = name.rpartition('.')
    file = Path(importlib.import_module(package).__file__)
    modules = [package]
    if file.stem == '__init__':
        modules = [f'{package}.{path.stem}' for path in sorted(file.parent.glob('*.py'))]
    for module in modules:
        description = ModuleAnalyzer.for_module(module).find_attr_docs().get(('', own))
        if description:  # as a function's: napoleon splits a value's "type: description"
            lines[:] = GoogleDocstring(description, app.config, app, 'function').lines()


def readable_signature(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    signature: str,
    returns: str,
) -> tuple[str, str]:
    """Shows functions by name, and leaves out what Flax adds to a module's arguments."""
    if signature:
        signature = re.sub(r'<(?:function|criterion) (\w+)[^>]*>', r'\1', signature)
    if what == 'class' and signature:
        signature = re.sub(r', parent: .*\)$', ')', signature)
    return signature, returns


def as_mathml(translator: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    formula = node.astext().replace(r'\middle', '')  # the one command that docutils lacks
    # Docutils sets the index of an accented letter below it, as if the letter were a sum.
    below = r'(<mi>.</mi>)((?:(?!<munderover>).)*?)(<mo [^>]*>[ˆˉ]</mo>)'
    text = re.sub(
        rf'<munderover>\s*{below}\s*</munderover>',
        r'<msub><mover accent="true">\1\3</mover>\2</msub>',
        tex2mathml(formula, as_block=block),
        flags=re.S,
    )
    translator.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Registers the extensions."""
    app.add_transform(LinkCode)
    app.add_html_math_renderer('mathml', (as_mathml, None), (as_mathml, None))
    app.connect('missing-reference', public_entry)
    app.connect('autodoc-process-docstring', described_where_defined, priority=900)
    app.connect('autodoc-process-signature', readable_signature)
