"""The page and the picture of `experiments.peers`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from branchy_jax.plots.canvas import INK, SERIES, new_grid, save
from branchy_jax.report import Record, markdown_table
from experiments.pages.tables import percent, table

_MARKS = 'oDs^vP'
_RATIOS = {
    'network': '{network}',
    'batch': '{batch}',
    'cores': '{cores}',
    'exits %': '{exits}',
    'best peer': '{best}',
    'best peer ÷ planned': '{ratio}',
    'planned': '{told}',
}
_ALL = {
    'network': '{network}',
    'batch': '{batch}',
    'cores': '{cores}',
    'contender': '{name}',
    'settings': '{told}',
    'exits %': '{exits}',
    'ms': '{ms:.4f}',
    '÷ planned': '{shown}',
    'busy while waiting': '{burnt:.3f}',
}

_OURS = 'planned here'
# The best peer's time ÷ planned, taken apart: of the networks without exits, and of what exits save to either.
_WHY = {
    'network': '{network}',
    'batch': '{batch}',
    'cores': '{cores}',
    'best peer': '{best}',
    'peer ÷ planned': '{ratio}',
    'both bare': '{bare}',
    'exits make planned faster': '{ours}',
    'exits make the peer faster': '{theirs}',
}

_LEGEND = """\
- planned here: what `bj.inference.plan` chose for the batch size, called with arrays of NumPy's or of jax's. Bare: what
  it chose for the network without exits.
- PyTorch: operation by operation, BatchNorm folded, in the faster layout; without exits, and with exits by masks: each
  stage runs on the rows that are left.
- torch.compile: the same, weights frozen; with exits each stage and each head is compiled.
- ONNX Runtime: the file that PyTorch exports of the network without exits. If: the file of `bj.export.save_onnx`, whose
  conditionals skip later stages; it takes one image."""


def page(record: Record) -> str:
    """Lays out the record in Markdown, with the picture that lies beside it."""
    cells = record['cells']
    names = _names(cells)
    columns = ['network', 'batch', 'cores', *names]
    times = [[cell['network'], str(cell['batch']), str(cell['cores']), *_times(cell, names)] for cell in cells]
    everyone = [
        {**cell, **timed, 'exits': percent(timed['shares']), 'shown': _interval(timed)}
        for cell in cells
        for timed in cell['contenders']
    ]
    parts = [
        '# Beside PyTorch and ONNX Runtime',
        _made_by(cells),
        'Random weights, forced exits, the same in every runtime, from images in host memory to labels there. '
        'Each contender has a process of its own and its best settings; tight loops, in turns. The ratio is the median '
        'over rounds with its 95 % interval: above 1 what is planned here is faster.',
        table(_RATIOS, [_ratio(cell) for cell in cells]),
        _short(cells),
        *_why(cells),
        '![Time of each peer, as a multiple of what is planned here](peers.png)',
        '## Milliseconds an image',
        markdown_table(columns, times),
        _absent(cells),
        '## Everyone',
        _LEGEND,
        'Shares are those achieved: without exits all leave at the last, and a plan that skips a head serves its '
        'images later. Busy while waiting: cores that a process used between its turns.',
        table(_ALL, everyone),
    ]
    return '\n\n'.join(parts) + '\n'


def sentence(cell: Record) -> str:
    """Says who the best peer of a cell is, and by how much."""
    planned, best = cell['contenders'][0], best_peer(cell)
    where = f'{cell["network"]}, batch {cell["batch"]}, {_cores(cell)}'
    if best is None:
        return f'{where}: {planned["ms"]:.4f} ms planned; no peer could take part'
    return f'{where}: {planned["ms"]:.4f} ms planned, {best["ms"]:.4f} {best["name"]}: {_interval(best)} times as long'


def best_peer(cell: Record) -> Record | None:
    """Returns the fastest of those that are not planned here."""
    peers = [timed for timed in cell['contenders'] if not _is_ours(timed['name'])]
    return min(peers, key=lambda peer: peer['ms'], default=None)


def _is_ours(name: str) -> bool:
    return name.startswith(_OURS)


def picture(path: Path | str, record: Record) -> None:
    """Draws the time of every peer as a multiple of the planned time, a network a panel, with intervals."""
    cells = record['cells']
    networks = list(dict.fromkeys(cell['network'] for cell in cells))
    peers = [name for name in _names(cells) if not _is_ours(name)]
    figure, axes = new_grid(
        'Time ÷ planned here (right of the line: planned is faster)',
        1,
        len(networks),
        size=(max(7.0, 3.6 * len(networks) + 0.6), 1.6 + 0.9 * max(_count(cells, network) for network in networks)),
    )
    for panel, network in zip(axes[0], networks, strict=True):
        _draw(panel, [cell for cell in cells if cell['network'] == network], peers)
        panel.set_title(network, color=INK, fontsize=10, loc='left')
    handles = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels())}  # noqa: B905 - as many of both
    save(figure, path, legend_columns=3, handles=list(handles.values()), labels=list(handles))


def _draw(axes: Any, cells: Sequence[Record], peers: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for place, (peer, mark, color) in enumerate(zip(peers, itertools.cycle(_MARKS), itertools.cycle(SERIES))):
        offset = 0.6 * ((place + 0.5) / len(peers) - 0.5)
        found = [
            (row + offset, timed)
            for row, cell in enumerate(cells)
            for timed in cell['contenders']
            if timed['name'] == peer
        ]
        if found:
            rows, ratios = [row for row, _ in found], [timed['ratio'] for _, timed in found]
            ends = [
                [timed['ratio'] - timed['ratio_low'] for _, timed in found],
                [timed['ratio_high'] - timed['ratio'] for _, timed in found],
            ]
            axes.errorbar(ratios, rows, xerr=ends, fmt=mark, color=color, markersize=5, linewidth=1, label=peer)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.set_yticks(range(len(cells)), [f'batch {cell["batch"]}\n{_cores(cell)}' for cell in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.grid(axis='x', color='#e5e5e5', linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _names(cells: Sequence[Record]) -> list[str]:
    """Returns everyone who took part in any cell, in the order of the contenders."""
    names = dict.fromkeys(timed['name'] for cell in cells for timed in cell['contenders'])
    return list(names)


def _count(cells: Sequence[Record], network: str) -> int:
    return sum(cell['network'] == network for cell in cells)


def _times(cell: Record, names: Sequence[str]) -> list[str]:
    found = {timed['name']: f'{timed["ms"]:.4f}' for timed in cell['contenders']}
    return [found.get(name, '–') for name in names]


def _ratio(cell: Record) -> dict[str, Any]:
    best = best_peer(cell)
    return {
        **cell,
        'exits': percent(cell['shares']),
        'best': '–' if best is None else best['name'],
        'ratio': '–' if best is None else _interval(best),
        'told': cell['contenders'][0]['told'],
    }


def _interval(timed: Mapping[str, Any]) -> str:
    return f'{timed["ratio"]:.2f} [{timed["ratio_low"]:.2f}, {timed["ratio_high"]:.2f}]'


def _cores(cell: Record) -> str:
    return '1 core' if cell['cores'] == 1 else f'{cell["cores"]} cores'


def _short(cells: Sequence[Record]) -> str:
    """Names the cells in which a peer may be faster."""
    bests = [(cell, best_peer(cell)) for cell in cells]
    short = [f'- {sentence(cell)}' for cell, best in bests if best is not None and best['ratio_low'] < 1]
    if not short:
        return f'In all {len(cells)} cells the lower end is at least 1.'
    return '\n'.join(['Where the lower end is below 1:', '', *short])


def _why(cells: Sequence[Record]) -> list[str]:
    """Takes each ratio apart, where the networks without exits were there, too."""
    rows = [row for cell in cells if (row := _apart(cell)) is not None]
    told = (
        'Taken apart, by the medians: peer ÷ planned = both bare, the networks without exits, × what exits make '
        'planned faster ÷ what they make the peer faster.'
    )
    return [told, table(_WHY, rows)] if rows else []


def _apart(cell: Record) -> dict[str, Any] | None:
    ms, best = {timed['name']: timed['ms'] for timed in cell['contenders']}, best_peer(cell)
    planned, ours = ms[_OURS], ms.get(f'{_OURS}, bare')
    theirs = None if best is None else ms.get(best['name'].partition(',')[0])
    if best is None or ours is None or theirs is None:
        return None
    return {
        **cell,
        'best': best['name'],
        'ratio': f'{best["ms"] / planned:.2f}',
        'bare': f'{theirs / ours:.2f}',
        'ours': f'{ours / planned:.2f}',
        'theirs': f'{theirs / best["ms"]:.2f}',
    }


def _absent(cells: Sequence[Record]) -> str:
    """Says who took no part, and why, once for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for name, reason in cell['absent'].items():
            found.setdefault((name, reason), []).append(f'{cell["network"]} at {cell["batch"]}')
    lines = [f'- {name}: {reason} ({", ".join(where)}).' for (name, reason), where in found.items()]
    return '\n'.join(['Not there:', '', *lines]) if lines else 'Everyone took part.'


def _made_by(cells: Sequence[Record]) -> str:
    lines = {
        f'- `{cell["command"]}`, {cell["device"]}, '
        + ', '.join(f'{name} {version}' for name, version in cell['packages'].items())
        + f', {cell["rounds"]} rounds'
        for cell in cells
    }
    return '\n'.join(sorted(lines))
