"""Base models: their names, sizes and files, and how they are loaded."""
