"""One pass through a model as training makes it: its layers, and what is said of each token."""
