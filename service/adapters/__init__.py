"""Trained adapters and the names they answer to."""
