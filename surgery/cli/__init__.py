"""Offer the library on the command line: surgery COMMAND."""

from surgery.cli.commands import app

__all__ = ["app"]
