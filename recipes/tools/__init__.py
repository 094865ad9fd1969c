"""Tools: commands that make a base model for the recipes where the real one cannot be had."""

__all__: list[str] = []
