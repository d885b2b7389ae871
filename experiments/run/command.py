"""What all commands share: flags of their own, parsed where they are used, and where a record comes from."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from pathlib import Path

import jax


def parser(doc: str) -> argparse.ArgumentParser:
    """Makes a command's parser: its docstring is the help. Commands that are imported together share nothing."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parser_of_a_run(doc: str) -> argparse.ArgumentParser:
    """Makes the parser of a command on a finished run, in ``--workdir``."""
    found = parser(doc)
    found.add_argument('--workdir', type=Path, required=True, help='Folder of a finished main job, or a stored report.')
    return found


def positive(text: str) -> int:
    """Reads a flag that counts something.

    Example:
        >>> positive('20')
        20
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'got {text!r}; give a positive integer')
    return int(text)


def positives(text: str) -> list[int]:
    """Reads a flag of several counts.

    Example:
        >>> positives('1,32')
        [1, 32]
    """
    return [positive(part) for part in text.split(',')]


def provenance(name: str) -> dict[str, str]:
    """Returns the fields of a record that say which command made it, and on what.

    Args:
        name: of the command, below ``experiments``.
    """
    return {'device': describe_device(), 'command': shlex.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])}


def describe_device() -> str:
    """Names the device and the versions that a measurement was made with."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != 'cpu' else f'{platform.machine()} CPU, {_cores()} cores'
    return f'{kind}, jax {jax.__version__}, Python {platform.python_version()}'


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
