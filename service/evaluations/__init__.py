"""Evaluations: jobs that score a model, and what their scores say."""
