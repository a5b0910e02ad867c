"""The one context manager that owners of descriptors and mappings share.

An owner forgets a descriptor or pointer *before* it closes or frees it. Python delivers
Ctrl-C when a call returns, such as ``os.close()``: an owner that forgot it only afterwards
would close it again in its cleanup, when the number may belong to another file.
"""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """Base of objects with :meth:`close`, which the end of a ``with`` block calls."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release all resources. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
