"""What the steps of the main job hand on: the trained networks, and the thresholds chosen for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import branchy_jax as bj
from branchy_jax.criteria import Criterion
from branchy_jax.types import Variables

TABLE = 'table'


@dataclasses.dataclass(frozen=True)
class Networks:
    """Both networks of a run, trained.

    Attributes:
        options: that they were created with.
        model: the branchy one.
        variables: of it.
        baseline: with one exit.
        baseline_variables: of that.
    """

    options: Mapping[str, Any]
    model: bj.BranchyNet
    variables: Variables
    baseline: bj.BranchyNet
    baseline_variables: Variables


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen on validation data.

    Attributes:
        criterion: that lets an input leave.
        screened: every setting of it.
        points: the settings chosen, by name; the first is the table's.
        tried: the table's setting under every criterion that was tried.
    """

    criterion: Criterion
    screened: bj.thresholds.Screen
    points: Mapping[str, bj.OperatingPoint]
    tried: Mapping[str, bj.OperatingPoint] = dataclasses.field(default_factory=dict)
