"""The engine as a process: how it is set up, what ends it, what it says when memory does."""
