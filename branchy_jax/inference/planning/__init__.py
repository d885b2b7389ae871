"""Choosing by measuring: times of stages and heads, a forecast of every choice, a race of the best."""
