"""A small HTTP service around `branchy_jax.inference.stream`: what leaves early under load, live."""
