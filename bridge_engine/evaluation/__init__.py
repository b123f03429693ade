"""Evaluation: what is asked, how answers are counted, and the job that does it."""
