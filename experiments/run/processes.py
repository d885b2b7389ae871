"""What has to be set before a process starts, for trainings at the speed of a CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

_STARTED = 'BRANCHY_JAX_STARTED'
_HOST_DEVICES = '--xla_force_host_platform_device_count'
# XLA:CPU gives its temporary memory back after every call, and the page faults of the next call cost more than the
# work. Kept, and in huge pages, it is there.
_ALLOCATOR = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=1000000000'  # noqa: E501 - one value


def start_again_on_cpu(devices: int) -> None:
    """Starts this very command again with the settings under which a CPU trains fastest; on a GPU or TPU it returns.

    Host devices share one pool of threads, and collectives of overlapping steps have been seen to wait for each other
    there without end: dispatch is synchronous.

    Args:
        devices: host devices to make; with 1 it returns.
    """
    if devices == 1 or _STARTED in os.environ or jax.default_backend() != 'cpu':
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings_on_cpu(devices), _STARTED: '1'})


def settings_on_cpu(devices: int) -> dict[str, str]:
    """Returns the environment variables of `start_again_on_cpu`; what the user has set stays as it is."""
    flags = os.environ.get('XLA_FLAGS', '')
    if _HOST_DEVICES not in flags:
        flags = f'{flags} {_HOST_DEVICES}={devices}'.strip()
    settings = {'GLIBC_TUNABLES': _ALLOCATOR, 'JAX_CPU_ENABLE_ASYNC_DISPATCH': '0'}
    return {**{name: os.environ.get(name, value) for name, value in settings.items()}, 'XLA_FLAGS': flags}


@contextlib.contextmanager
def as_a_user_starts_them() -> Iterator[None]:
    """Lets processes that start within it start as if nothing had been set: clocks compare what users get."""
    before = dict(os.environ)
    if os.environ.pop(_STARTED, None):
        flags = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if not flag.startswith(_HOST_DEVICES)]
        os.environ['XLA_FLAGS'] = ' '.join(flags)
        if os.environ.get('GLIBC_TUNABLES') == _ALLOCATOR:
            del os.environ['GLIBC_TUNABLES']
        os.environ.pop('JAX_CPU_ENABLE_ASYNC_DISPATCH', None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
