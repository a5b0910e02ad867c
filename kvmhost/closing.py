"""The one context manager that owners of descriptors and mappings share."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """Something that :meth:`close` takes down, also at the end of a ``with`` block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
