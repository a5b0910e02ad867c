"""Changes of the tracker that readers forced on the others, and which one undoes which.

The changes form a chain. The end of a reader's view undoes its change; if another reader has
forced a later one, that one then leads back to the tracker before both.
"""

from __future__ import annotations

import dataclasses

from kvmhost.trackers.views import ViewKey

__all__ = ["ForcedChanges"]


@dataclasses.dataclass
class _Forced:
    by: ViewKey
    before: str


class ForcedChanges:
    """The forced changes of one source, in order."""

    def __init__(self) -> None:
        self._changes: list[_Forced] = []

    def note(self, key: ViewKey, before: str, wanted: str) -> None:
        """Note a change by a reader, or that it took its own change back."""
        own = next((change for change in self._changes if change.by == key), None)
        if own is None:
            self._changes.append(_Forced(key, before))
        elif own.before == wanted:
            self._changes.remove(own)

    def undo(self, key: ViewKey) -> str | None:
        """Forget a reader's change; return the tracker to put back, None for none."""
        at = next((i for i, change in enumerate(self._changes) if change.by == key), None)
        if at is None:
            return None
        change = self._changes.pop(at)
        if at < len(self._changes):
            self._changes[at].before = change.before
            return None
        return change.before

    def clear(self) -> None:
        """Forget all: the tracker in use stays."""
        self._changes.clear()

    def takes_back(self, key: ViewKey, wanted: str) -> bool:
        """Return whether a reader asks for the tracker that its own change replaced."""
        return (key, wanted) in [(change.by, change.before) for change in self._changes]

    def is_forced_on(self, key: ViewKey, wanted: str) -> bool:
        """Return whether a reader asks for the tracker that others' changes replaced.

        It goes on with the one that was forced on it.
        """
        by = [change.by for change in self._changes]
        return bool(by) and key not in by and wanted == self._changes[0].before
