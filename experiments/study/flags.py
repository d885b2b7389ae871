"""Flags that several commands have, parsed where they are used."""

import argparse
from pathlib import Path


def parser(doc: str, workdir: str = '') -> argparse.ArgumentParser:
    """Makes a command's parser: its docstring is the help; ``workdir`` is the help of that flag."""
    as_written = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=as_written, allow_abbrev=False)
    if workdir:
        made.add_argument('--workdir', type=Path, required=True, help=workdir)
    return made


def positive(text: str) -> int:
    """Reads a flag that holds a count."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'got {text!r}; give a positive integer')
    return int(text)


def positives(text: str) -> list[int]:
    """Reads a flag of several counts, such as ``1,32``."""
    return [positive(part) for part in text.split(',')]


def shares(text: str) -> dict[str, list[float]]:
    """Reads a flag of percentages that leave at each exit, such as ``94/6,70/30``."""
    return {part: [float(share) / 100 for share in part.split('/')] for part in text.split(',')}
