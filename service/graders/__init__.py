"""Trying a grader on given answers."""
