"""One small declarative file per system; the file name is the recipe's name."""
