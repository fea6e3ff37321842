"""Seconds as people say them."""


def readable_time(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``; never none at all."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
