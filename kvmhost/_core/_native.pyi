"""The generated extension; cffi types it at run time."""

from typing import Any

ffi: Any
lib: Any
