"""Trains a baseline and a branchy network, picks thresholds on validation data, evaluates once on test data.

    python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k

A run that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from experiments.job import run

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the run.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, weights and the report.')


def main(arguments: list[str]) -> None:
    """Parses flags and runs the job."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    try:
        run(_CONFIG.value, Path(_WORKDIR.value))
    except ValueError as error:
        raise app.UsageError(str(error)) from error


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main)
