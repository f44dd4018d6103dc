"""Moves paged KV from a prefill rank to a decode rank: engines, plan, sender, receiver."""
