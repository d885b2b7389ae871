"""Rewriting a trained network for inference, exactly: fewer operations, in the forms that a backend runs fastest."""
