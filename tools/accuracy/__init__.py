"""``kvmhost accuracy``: how right each tracker is, and what it costs.

The truth is computed from the guests' parameters (``guests/workloads.py``), which shares
no code with the guests. Measured for each tracker that works here:

- at doorbells: the guest stops after each epoch, one harvest there. Precision and recall
  must be 1.0 (precision not where a bit is reported as coarse). *old after*: harvests
  until a page that is no longer touched reads as old, *new after*: until a newly touched
  one reads as young; 1 is at once. Mean and maximum. With *re-armed* 1/N a harvest clears
  and re-arms only one page in N.
- running: the guest runs on. A harvest must report what every epoch inside its window
  touched (else: missed) and nothing that no epoch that overlaps the window did (else:
  wrong); the precision lies between what is certain and what is possible.
- cost: a harvest by page of memory, clearing and re-arming by page that was young, the
  guest's fault on its next touch, and the guest's throughput against none at so many
  harvests a second, re-arming young pages, all of memory, or a sample.

A tracker that sees only writes is held against what was written. Exit status 1 if a
tracker is not exact where it has to be.
"""

from __future__ import annotations

from kvmhost.tools.accuracy.command import Settings, main, parser, run
from kvmhost.tools.accuracy.kinds import KINDS, WORKLOADS

__all__ = ["KINDS", "WORKLOADS", "Settings", "main", "parser", "run"]
