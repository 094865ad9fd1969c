"""Find the sites of a whole model in one run of it."""

from surgery.locator.search import locate

__all__ = ["locate"]
