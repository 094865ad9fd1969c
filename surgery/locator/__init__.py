"""Find the sites of a whole model by the dataflow of one run."""

from surgery.locator.search import locate

__all__ = ["locate"]
