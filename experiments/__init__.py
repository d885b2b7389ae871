"""Runs, benchmarks and figures made with branchy_jax; not part of the package."""
