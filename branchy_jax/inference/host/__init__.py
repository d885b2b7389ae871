"""Executors that the host drives: rows wait before each stage until a chunk of them has come together."""
