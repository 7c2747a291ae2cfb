"""The object store: blocks in use and who holds them, refs, limits."""

from __future__ import annotations

from shmpool.store.current import live_blocks

__all__ = ["live_blocks"]
