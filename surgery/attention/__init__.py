"""Compute attention together with the logsumexp of its scores, and add virtual tokens to it."""

from surgery.attention.library_functions import with_lse
from surgery.attention.sdpa import attention, logsumexp
from surgery.attention.transforms import transformed
from surgery.attention.virtual_keys import virtual_lse, virtual_tokens

__all__ = ["attention", "logsumexp", "transformed", "virtual_lse", "virtual_tokens", "with_lse"]
