"""The paper's figures, to stand beside ours: Teerapittayanon et al., BranchyNet, ICPR 2016."""

from __future__ import annotations

from typing import Any

_NOTE = 'trunk segments only, thresholds picked on test data'


def _row(
    network: str, accuracy: float, cpu_ms: float, gpu_ms: float, thresholds: list[float], exits: list[float]
) -> Any:
    return {
        'network': f'{network} (paper)',
        'test_accuracy': accuracy,
        'latency_ms': cpu_ms,
        'gpu_latency_ms': gpu_ms,
        'thresholds': thresholds,
        'exit_fractions': exits,
        'note': _NOTE,
    }


# Table I: batch 1, 3.0 GHz CPU and GTX TITAN X. Keyed by branchy network: the baseline's row, then its own.
TABLE_1 = {
    'b-lenet': [
        _row('LeNet', 0.9920, 3.37, 1.58, [], [1.0]),
        _row('B-LeNet', 0.9925, 0.62, 0.34, [0.025], [0.943, 0.0563]),
    ],
    'b-alexnet': [
        _row('AlexNet', 0.7838, 9.56, 3.15, [], [1.0]),
        _row('B-AlexNet', 0.7919, 6.32, 1.30, [0.0001, 0.05], [0.656, 0.252, 0.092]),
    ],
    'b-resnet110': [
        _row('ResNet-110', 0.8070, 137.20, 70.9, [], [1.0]),
        _row('B-ResNet', 0.7917, 73.5, 37.2, [0.3, 0.2], [0.415, 0.138, 0.447]),
    ],
}


def rows_beside(network: str) -> list[dict[str, Any]]:
    """Returns the paper's rows for a branchy network, with gains; none if the paper has not measured it."""
    rows = TABLE_1.get(network, [])
    return [{**row, 'gain': rows[0]['latency_ms'] / row['latency_ms']} for row in rows]
