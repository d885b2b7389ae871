"""What is counted in compiled programs is what is there, and chips that are not here keep the conditionals."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import branchy_jax as bj
from branchy_jax.report import read_json, write_json
from experiments import chips

TEXT = """
  %a = f32[4]{0} fusion(f32[4]{0} %x), kind=kLoop, calls=%copy.body
  ROOT %b = f32[4]{0} conditional(pred[] %p, f32[4]{0} %a, f32[4]{0} %a), branch_computations={%one, %two}
  %c = (s32[], f32[4]{0}) while((s32[], f32[4]{0}) %t), condition=%until, body=%conditional.3
  %d = f32[4]{0} copy(f32[4]{0} %a)
  %e = (f32[4]{0}, f32[4]{0}, u32[]) copy-start(f32[4]{0} %a)
  %f = f32[4]{0} copy-done((f32[4]{0}, f32[4]{0}, u32[]) %e)
  %g = f32[4]{0} custom-call(f32[4]{0} %a), custom_call_target="__cublas$gemm", metadata={op_name="while(x)"}
  %h = f32[4]{0} custom-call(f32[4]{0} %a), custom_call_target="xla_ffi_python_gpu_callback"
  %i = f32[4]{0} custom-call(f32[4]{0} %a), custom_call_target="__cublas$gemm"
  %j = (f32[4]{0}, token[]) infeed(token[] %k)
  %l = (f32[4]{0}, u32[], token[]) send(f32[4]{0} %a, token[] %k), channel_id=1, is_host_transfer=true
"""


def compiled(network, run, policy, **executor):
    model, variables, images = network
    return chips.compiled(run(model, **executor), (variables, images, policy), 'cpu')


def test_operations_are_counted_not_their_names():
    assert chips.counts(TEXT) == {
        'conditionals': 1,
        'loops': 1,
        'fusions': 1,
        'copies': 2,
        'custom_calls': {'__cublas$gemm': 2, 'xla_ffi_python_gpu_callback': 1},
        'host_transfers': 3,
    }


def test_staged_has_a_conditional_per_side_exit_and_vmap_turns_them_into_selects(network):
    model, variables, images = network
    one = chips.compiled(bj.inference.staged(model), (variables, images[0], jnp.ones(2)), 'cpu')
    assert (one['conditionals'], one['loops'], one['host_transfers']) == (2, 0, 0)
    every = jax.vmap(bj.inference.staged(model), (None, 0, None))
    assert chips.compiled(every, (variables, images, jnp.ones(2)), 'cpu')['conditionals'] == 0


def test_batches_loop_on_the_device(network):
    found = compiled(network, bj.inference.compacted, jnp.ones(2), chunk_size=4, on_host=False)
    assert found['loops'] >= 2
    assert found['host_transfers'] == 0
    assert found['temporary_bytes'] > 0


def test_a_call_of_the_host_is_seen():
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    found = chips.compiled(lambda x: jax.pure_callback(np.sin, spec, x), (jnp.ones(2),), 'cpu')
    assert found['host_transfers'] == 1


def test_results_of_the_other_chip_stay_on_the_page(tmp_path, monkeypatch):
    counted = {**chips.counts(TEXT), 'temporary_bytes': 2_000_000, 'compile_s': 1.0, 'jax': '0'}
    before = [
        {'platform': p, 'network': 'b-lenet', 'executor': 'staged', 'command': f'for {p}', **counted}
        for p in ('tpu', 'cuda')
    ]
    write_json(tmp_path / 'chips.json', {'programs': before})
    monkeypatch.setattr(chips, '_as_if_there', lambda: None)
    monkeypatch.setattr(chips, '_devices', lambda platform: jax.devices())
    monkeypatch.setattr(chips, '_executors', lambda name, place: [('dense', None, ())])
    monkeypatch.setattr(chips, 'compiled', lambda *arguments: chips.counts(''))
    monkeypatch.setattr(chips, 'page', lambda record: 'page')
    chips.main(['--platform=cuda', f'--workdir={tmp_path}', '--networks=b-lenet'])
    programs = read_json(tmp_path / 'chips.json')['programs']
    assert [(p['platform'], p['executor']) for p in programs] == [('tpu', 'staged'), ('cuda', 'dense')]
    assert programs[0] == before[0]


def test_page_tells_commands_and_calls():
    row = {
        'platform': 'tpu',
        'network': 'b-lenet',
        'executor': 'staged',
        'command': 'the command',
        'jax': '0.1',
        **chips.counts(TEXT),
        'temporary_bytes': 2_000_000,
    }
    page = chips.page({'programs': [row, row]})
    assert page.count('the command') == 1
    assert '| TPU v5e | b-lenet | staged   | 1 ' in page
    assert '2 __cublas$gemm, 1 xla_ffi_python_gpu_callback' in page
    assert '| 2.00 ' in page


def test_a_tpu_keeps_the_conditionals(tmp_path):
    pytest.importorskip('libtpu', reason="pip install 'jax[tpu]'")
    root = str(Path(chips.__file__).parents[1])
    command = [
        sys.executable,
        '-m',
        'experiments.chips',
        '--platform=tpu',
        f'--workdir={tmp_path}',
        '--networks=b-lenet',
    ]
    environment = {**os.environ, 'PYTHONPATH': root}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    programs = {p['executor']: p for p in read_json(tmp_path / 'chips.json')['programs']}
    assert programs['staged']['conditionals'] == 1
    assert (programs['compacted']['loops'], programs['compacted']['host_transfers']) == (2, 0)
