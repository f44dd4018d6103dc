"""Paged KV as bytes: geometry, page runs, staging slabs, gather and scatter, page allocation."""
