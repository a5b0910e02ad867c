"""One factor for all time-outs, for hosts that are much slower than usual.

``$KVMHOST_TIME_SCALE``, such as ``20``, multiplies every time-out that the user did not give.
The lab sets it inside emulated hosts.
"""

from __future__ import annotations

import math
import os

from kvmhost.errors import LayoutError

__all__ = ["check_time_scale", "scaled"]

VARIABLE = "KVMHOST_TIME_SCALE"
MAX_SCALE = 1000.0


def scaled(seconds: float) -> float:
    """Return a time-out for this host; an invalid factor counts as 1."""
    return seconds * (_factor() or 1.0)


def check_time_scale() -> None:
    """Check the environment variable.

    :raises LayoutError: if it is not a number from 1 to 1000
    """
    if _factor() is None:
        text = os.environ[VARIABLE]
        raise LayoutError(f"{VARIABLE}={text!r}: need a number from 1 to {MAX_SCALE:g}")


def _factor() -> float | None:
    """Return the factor; None if the variable is not a valid one."""
    try:
        value = float(os.environ.get(VARIABLE) or 1)
    except ValueError:
        return None
    return value if math.isfinite(value) and 1 <= value <= MAX_SCALE else None
