"""From model outputs to figures."""
