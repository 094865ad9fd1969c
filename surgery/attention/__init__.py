"""Compute attention as ``(context, lse)``, and all that follows from the two."""

from surgery.attention.library_functions import with_lse
from surgery.attention.sdpa import attention, logsumexp
from surgery.attention.virtual import virtual_lse, virtual_tokens

__all__ = ["attention", "logsumexp", "virtual_lse", "virtual_tokens", "with_lse"]
