"""Figures of a step by their names; what methods return and the metrics stream carries."""

Metrics = dict[str, float]
