"""The job spec: what a user may ask for, in one description that everyone shares."""
