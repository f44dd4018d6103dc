"""How many examples a property is tried with."""

from hypothesis import settings

FAST_SHARE = 10


def n_examples(full: int) -> int:
    """``full``, or a tenth of it (25 at the most, but 5 at least) under ``--fast``."""
    if settings.get_current_profile_name() != "fast":
        return full
    return min(full, max(5, min(25, full // FAST_SHARE)))
