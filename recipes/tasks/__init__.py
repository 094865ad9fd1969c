"""The built-in tasks; they come in through our own entry points, as anybody's do."""
