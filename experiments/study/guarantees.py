"""Draws calibration sets from cached outputs, and counts how often a guarantee from such a set fails."""

import itertools
from typing import Any

import numpy as np

from branchy_jax.thresholds import ExitTable
from branchy_jax.thresholds.guarantees import METHODS, last_passed, losses_along


class Population:
    """Inputs whose losses along a path are known, to draw calibration sets from.

    A guarantee is about the distribution of calibration inputs. Here this is the empirical distribution of the given
    inputs: draws are with replacement, and the true risk is the mean over all inputs.

    Args:
        path: ``[G, N - 1]`` settings fixed on other data.
        table: of the inputs.
        losses: ``[N, B]`` in [0, 1].
        size: inputs in a calibration set.
        splits: how many sets are drawn.
    """

    def __init__(self, path: np.ndarray, table: ExitTable, losses: np.ndarray, *, size: int, splits: int) -> None:
        self.losses, exits = losses_along(path, table, losses)
        self.risk = self.losses.mean(axis=1)
        self.saved = 1 - table.costs.to_exit[exits].mean(axis=1) / table.costs.trunk
        self.full = np.isneginf(path).all(axis=1)
        self.drawn = np.random.default_rng(0).integers(self.losses.shape[1], size=(splits, size))

    def learn_then_test(self, method: str, epsilon: float, delta: float) -> np.ndarray:
        """Returns for every calibration set where on the path fixed-sequence testing stops."""
        options = {'delta': delta} if method == 'betting' else {}
        passes = np.zeros((len(self.drawn), len(self.risk)), bool)
        alive = np.arange(len(self.drawn))
        for g, loss in enumerate(self.losses):
            if not self.full[g]:
                alive = alive[METHODS[method](loss[self.drawn[alive]], epsilon, **options) <= delta]
            passes[alive, g] = True
        return np.array([last_passed(row) for row in passes])

    def plain_screen(self, epsilon: float) -> np.ndarray:
        """Returns for every calibration set the cheapest setting that loses at most ε on that set itself."""
        risks = np.array([loss[self.drawn].mean(axis=1) for loss in self.losses])
        allowed = np.where(risks <= epsilon, self.saved[:, None], -np.inf)
        return allowed.argmax(axis=0)

    def conformal(self, epsilon: float) -> np.ndarray:
        """Returns for every calibration set where conformal risk control stops."""
        envelope = np.maximum.accumulate(self.losses, axis=0)
        count = self.drawn.shape[1]
        risks = np.array([loss[self.drawn].mean(axis=1) for loss in envelope])
        passes = self.full[:, None] | (count / (count + 1) * risks + 1 / (count + 1) <= epsilon)
        return np.array([last_passed(row) for row in passes.T])

    def outcome(self, stops: np.ndarray, epsilon: float) -> dict[str, float]:
        """Returns how often the guarantee failed, and how much cost was saved."""
        return {
            'splits': len(stops),
            'broken': float((self.risk[stops] > epsilon).mean()),
            'mean_risk': float(self.risk[stops].mean()),
            'cost_saved': float(self.saved[stops].mean()),
        }


_EPSILONS, _DELTAS = (0.005, 0.01, 0.02), (0.05, 0.1)


def simulate(loss: str, population: Population) -> list[dict[str, Any]]:
    """Runs every method on a population: with a guarantee, with one in expectation only, and with none.

    Args:
        loss: its name, for the rows.
        population: to draw from.
    """
    rows = []
    for epsilon in _EPSILONS:
        stops: dict[tuple[str, float | None], np.ndarray] = {
            (method, delta): population.learn_then_test(method, epsilon, delta)
            for method, delta in itertools.product(METHODS, _DELTAS)
        }
        stops['conformal risk control, in expectation', None] = population.conformal(epsilon)
        stops['no guarantee: the cheapest on the calibration set', None] = population.plain_screen(epsilon)
        for (method, delta), own in stops.items():
            row = {'loss': loss, 'method': method, 'epsilon': epsilon}
            if delta is not None:
                row |= {'delta': delta, 'allowed': delta + 2 * (delta * (1 - delta) / len(own)) ** 0.5}
            rows.append({**row, **population.outcome(own, epsilon)})
    return rows
