"""Draw a running VM or process: it is recorded first, into a temporary directory.

So the picture has what pictures of records have: layers of residency, gaps, coverage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from kvmhost.control.client import Client
from kvmhost.errors import VmGoneError
from kvmhost.process.attach import Attached
from kvmhost.reclaim.draw.heatmapdata import RecordView, used_view
from kvmhost.reclaim.draw.registry import draw_record
from kvmhost.reclaim.record.chunks import need_zstd
from kvmhost.reclaim.record.files import is_record
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.recorder import RecordingPlan, record_vm
from kvmhost.temporary import temporary_folder

__all__ = ["draw_vm"]


def draw_vm(
    source: Client | Attached,
    path: Path,
    plan: RecordingPlan,
    *,
    show_all: bool = False,
    on_window: Callable[[], None] = lambda: None,
    **options: object,
) -> str:
    """Record a VM as planned, until it exits or an interrupt, and draw that.

    :param show_all: also the parts of a mostly idle memory that are not used
    :param on_window: called after each window
    :param options: of the kind of picture, see :func:`.registry.draw_record`
    :return: a line about the picture
    :raises VmGoneError: if the VM exits before the end of the first window
    :raises ControlError: if the VM rejects harvests
    :raises CapabilityError: if a library is missing
    :raises HostError: if the file cannot be written
    """
    need_zstd()
    with temporary_folder("kvmhost-young-") as folder:
        at = Path(folder, "record.young")
        try:
            record_vm(source, at, plan, threading.Event(), on_window)
        except KeyboardInterrupt:
            if not _has_windows(at):
                raise
        with YoungRecord.open(at) as record:
            if not len(record):
                raise VmGoneError(source.vm, "exited before the end of the first window")
            whole = show_all or plan.gfns is not None
            view = RecordView(record) if whole else used_view(record)
            return draw_record(view, path, **options)


def _has_windows(path: Path) -> bool:
    if not is_record(path):
        return False
    with YoungRecord.open(path) as record:
        return len(record) > 0
