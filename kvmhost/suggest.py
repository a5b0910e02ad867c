"""Messages about unknown names, in one wording, with the closest known name."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["did_you_mean", "unknown_name"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'NAME'?"`` for the closest known name, else "".

    Case does not count. A name that starts with the given one is close to it, and so is
    one of the same words in another order.
    """
    import difflib  # Only errors need it.

    by_folded = {other.casefold(): other for other in known}
    folded = name.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    if not close and len(folded) > 2:
        close = [other for other in by_folded if other.startswith(folded)][:1]
        close = close or [other for other in by_folded if _words(other) == _words(folded)][:1]
    return f", did you mean {by_folded[close[0]]!r}?" if close else ""


def _words(name: str) -> list[str]:
    return sorted(name.replace("-", "_").split("_"))


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return ``"unknown tracker 'dity', did you mean 'dirty'? (there are: auto, dirty)"``.

    :param what: kind of the name, such as ``tracker``
    :param known: the existing names; if none, the message ends after the name
    """
    names = list(known)
    there = f" (there are: {', '.join(names)})" if names else ""
    return f"unknown {what} {name!r}{did_you_mean(name, names)}{there}"
