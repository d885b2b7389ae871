"""The paper's figures, to stand beside ours: Teerapittayanon et al., BranchyNet, ICPR 2016."""

from __future__ import annotations

from typing import Any

JPEG_NOTE = 'This CIFAR-10 is a copy re-encoded as JPEG (quality 75).'
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


# Figure 3: (GPU ms, accuracy %) as T varies, and which point is the knee. Digitised.
FIGURE_3 = {
    'b-lenet': ([(0.26, 98.57), (0.27, 98.92), (0.32, 99.23), (0.34, 99.25), (1.70, 99.27)], 3),
    'b-alexnet': ([(0.91, 74.9), (0.97, 76.0), (1.04, 77.1), (1.15, 78.1), (1.31, 79.19), (3.22, 79.16)], 4),
    'b-resnet110': (
        [(1.95, 63.8), (17.8, 69.5), (19.9, 73.4), (32.4, 78.1), (37.2, 79.17), (60.8, 81.65), (72.9, 81.8)],
        4,
    ),
}
# Figure 4, B-AlexNet: (share that leaves first in %, accuracy %).
FIGURE_4_ACCURACY = [(0, 79.16), (46, 79.51), (67, 79.11), (83, 77.35), (100, 74.90)]
# Figure 5, B-AlexNet: accuracy % of the last exit with 0 to 4 convolutions in branch 1.
FIGURE_5 = [76.6, 77.8, 78.0, 77.9, 77.4]
# Figure 6, on the CPU: (ms, cache misses %) of B-AlexNet as T varies, and of AlexNet.
FIGURE_6 = [(4.08, 0.050), (4.87, 0.051), (6.32, 0.113), (9.83, 0.225)]
FIGURE_6_BASELINE = (9.56, 0.221)


def rows_beside(network: str) -> list[dict[str, Any]]:
    """Returns the paper's rows for a branchy network, with gains; none if the paper has not measured it."""
    rows = TABLE_1.get(network, [])
    return [{**row, 'gain': rows[0]['latency_ms'] / row['latency_ms']} for row in rows]
