"""Pages of what networks answered where other runtimes are: ONNX Runtime, IREE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.pages.tables import percent, table

_ANSWERS = {'network': '{network}', 'weights': '{weights}'}
_DIFFERENCES = {
    'images': '{images}',
    'differ': '{differ}',
    'differ at ties': '{ties}',
    'exits %': '{shown_shares}',
}


def onnx_page(record: dict[str, Any]) -> str:
    """Returns the page of ``experiments.exported --onnx``."""
    rows = [
        {
            **_shown(row),
            'asked': ', '.join(f'{count}' for count in row['exits_asked'].values()),
            'ms': ' / '.join(f'{ms:.4f}' for ms in reversed(row['ms'])) if 'ms' in row else '–',
            'gain': '{:.2f} [{:.2f}, {:.2f}]'.format(*row['gain']) if 'gain' in row else '–',
            'share': f'{row["gain"][0] / row["mac_limit"]:.2f}' if 'gain' in row else '–',
        }
        for row in record['rows']
    ]
    answers = {
        **_ANSWERS,
        'MB': '{megabytes:.2f}',
        '`If`': '{conditionals}',
        **_DIFFERENCES,
        'exits asked': '{asked}',
    }
    clocks = {
        'network': '{network}',
        'ms, without exits': '{ms}',
        'gain': '{gain}',
        'MAC limit': '{mac_limit:.2f}',
        'of the limit': '{share}',
        'device': '{device}',
    }
    return _page(
        'ONNX files in ONNX Runtime',
        record,
        'Each network is one file with an `If` for each side exit; pixels go in. `differ` counts images whose label or '
        'exit is not that of `dense`; images whose uncertainty is within 1e-4 of a threshold, relatively, are ties, '
        'and count apart. `exits asked` is, for an image of each exit, up to which exit any node ran by ONNX '
        "Runtime's profile: 1, 2, … means that nothing ran for nothing.",
        table(answers, rows),
        'Time of an image, batch 1, one core: the file, and the file of the same network without exits. The gain is '
        'the median over interleaved passes with its 95 % interval, the MAC limit that of these images.',
        table(clocks, rows),
    )


def iree_page(record: dict[str, Any]) -> str:
    """Returns the page of ``experiments.exported --iree``."""
    columns = {
        **_ANSWERS,
        'program': '{program}',
        'text, MB': '{megabytes:.2f}',
        **_DIFFERENCES,
        'ms': '{shown_ms}',
    }
    rows = [{**_shown(row), 'shown_ms': f'{row["ms"]:.3f}' if 'ms' in row else '–'} for row in record['rows']]
    return _page(
        'StableHLO text by IREE',
        record,
        'The text of two programs of each exported folder, compiled by IREE for the CPU at hand and run on one thread '
        'without jax: `staged` takes one image, `batch` 64. `differ` counts images whose label or exit is not that of '
        '`dense`; images whose uncertainty is within 1e-4 of a threshold, relatively, are ties, and count apart. '
        'Milliseconds are of an image, the median of passes on one core.',
        table(columns, rows),
    )


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {'onnx': onnx_page, 'iree': iree_page}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        'ties': f'{row["differ at ties"]} of {row["ties"]}',
        'megabytes': row['bytes'] / 1e6,
        'shown_shares': percent(row['shares']),
    }


def _page(title: str, record: dict[str, Any], *parts: str) -> str:
    commands = '\n'.join(sorted({f'- `{row["command"]}`, {row["device"]}' for row in record['rows']}))
    environment = 'In an environment of ' + ', '.join(record['environment']) + '.'
    return '\n\n'.join([f'# {title}', commands, environment, *parts]) + '\n'
