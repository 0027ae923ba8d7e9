"""From figures to tables, plots and terminal pictures."""
