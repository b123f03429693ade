"""Projects: whose jobs, and how much they may use."""
