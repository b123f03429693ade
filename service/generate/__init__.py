"""Text from base models and trained adapters."""
