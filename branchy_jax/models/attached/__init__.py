"""Exits on networks that are left as they are: one Flax module, Linen or NNX, read at places inside it."""
