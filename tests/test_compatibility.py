"""Networks in the structure of those that people use; the command checks more of them, in more steps."""

import pytest

from experiments.study import compatibility


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'steps'),
    [
        ('ConvNeXt, NNX, as in Bonsai', ('train', 'optimize', 'ONNX', 'MACs')),
        ('BiT, as in big_vision', ('train', 'ONNX', 'MACs')),
        ("text classifier with LSTM, as in Flax's examples", ('train', 'ONNX', 'MACs')),
        ("graph network, as in Flax's examples", ('executors', 'ONNX', 'MACs')),
        ("BERT, as in Hugging Face's Flax", ('train', 'optimize', 'ONNX', 'MACs')),
    ],
)
def test_each_step_gives_the_right_answer(name, steps):
    assert compatibility.check(name, steps) == dict.fromkeys(('attach', *steps), 'works')
