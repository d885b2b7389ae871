"""Trains a baseline and a branchy network, picks thresholds on validation data, evaluates once on test data.

    python -m experiments.main --config=experiments/configs/lenet_mnist5k.py --workdir=runs/lenet_mnist5k

A run that was interrupted goes on where it stopped when the same command is given again. Flags of
`experiments.devices` say on how many devices, which may be others then.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.configs import common
from experiments.devices import mesh_from_flags
from experiments.job import run
from experiments.processes import start_again_on_cpu

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Settings of the run.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, weights and the report.')


def main(arguments: list[str]) -> None:
    """Hands the parsed flags to the job."""
    if len(arguments) > 1:
        raise app.UsageError(f'Unexpected arguments: {" ".join(arguments[1:])}')
    logging.set_verbosity(logging.WARNING)  # orbax would log a dozen lines a checkpoint over the progress bar
    config = _CONFIG.value
    start_again_on_cpu(config.cpu_devices)
    run(config, Path(_WORKDIR.value), mesh=mesh_from_flags(config.cpu_devices))


def _parse(arguments: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(arguments)
    except AttributeError as error:  # what ml_collections raises, with a suggestion, for a field that is not there
        raise ValueError(f'config: no field {error}; choose from {", ".join(common.get_config())}') from error


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main, flags_parser=_parse)
