"""The staged loop, its checkpoints and its log."""
