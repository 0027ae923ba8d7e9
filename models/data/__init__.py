"""Data sets as plain tensors and their prompts."""
