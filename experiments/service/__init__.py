"""A small HTTP service around `branchy_jax.inference.stream`, with a page that shows which images leave early."""
