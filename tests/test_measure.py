import itertools

import numpy as np
import pytest
from scipy import stats

from branchy_jax.measure import interleaved_passes, one_by_one, paired_ratio


def test_passes_interleave_in_rotating_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'abc'}
    seconds = interleaved_passes(functions, passes=4, warmup=2)
    turns = [''.join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert len(turns) == 6
    assert all(sorted(turn) == list('abc') for turn in turns)
    assert len(set(turns)) == 3
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys('abc', (4,))
    assert all((values >= 0).all() for values in seconds.values())


def test_nothing_to_time():
    with pytest.raises(ValueError, match='functions'):
        interleaved_passes({})


def test_one_by_one_calls_each_input():
    seen = []
    one_by_one(seen.append, [1, 2, 3])()
    assert seen == [1, 2, 3]


def test_ratio_is_of_pairs_not_of_medians():
    baseline, candidate = np.array([1.0, 10.0, 100.0]), np.array([1.0, 5.0, 200.0])
    ratio = paired_ratio(baseline, candidate)
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize('pairs', [10, 20, 41])
def test_interval_covers_the_median_19_times_in_20(pairs):
    """Brute force over which order statistics bracket the median of any continuous distribution."""
    ratio = paired_ratio(np.arange(1.0, pairs + 1), np.ones(pairs))
    low, high = int(ratio.low) - 1, int(ratio.high) - 1
    coverage = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 1, high + 1))
    narrower = sum(stats.binom.pmf(below, pairs, 0.5) for below in range(low + 2, high))
    assert coverage >= 0.95 > narrower


def test_interval_holds_for_drifting_pairs():
    drift = np.array(list(itertools.islice(itertools.cycle([1.0, 3.0]), 20)))
    ratio = paired_ratio(2 * drift, drift)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
