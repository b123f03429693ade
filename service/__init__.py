"""The REST API and the store behind it."""
