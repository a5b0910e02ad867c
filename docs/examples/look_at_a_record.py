# %% [markdown]
# # A look at a record
#
# A record holds which guest pages were young in each window. Make one of a running VM
# with `kvmhost young record vm1 -o vm1.young`, then open this file as a notebook
# (Jupyter, VS Code) or run it:
#
#     $ python look_at_a_record.py vm1.young

# %%
import sys

import numpy as np

from kvmhost.reclaim.analyse.analysis import histograms, working_set
from kvmhost.reclaim.record.reader import YoungRecord

# Where a notebook runs this, the arguments are the notebook's own.
given = [word for word in sys.argv[1:] if word.endswith(".young")]
record = YoungRecord.open(given[0] if given else "vm1.young")
record  # a notebook shows a table

# %% How much was young in each window?
young = record.column("n_young")
print(f"{len(record)} windows of {record.n_pages} pages; young: {young.min()} to {young.max()}")

# %% The last window as an array of booleans over gfns
last = record.bitmap(-1)
print(f"first young pages of the last window: {[hex(gfn) for gfn in last.gfns()[:4]]}")

# %% Which pages were young in every window, and which in none?
always = record.between(0, len(record), "and")
ever = record.between(0, len(record), "or")
print(f"always young: {always.count()}, never young: {record.n_pages - ever.count()}")

# %% One page, window by window
gfn = int(ever.gfns()[0])
print(f"gfn {gfn:#x}: {''.join('#' if touched else '.' for touched in record.history(gfn))}")

# %% The working set: pages young within the last three windows, at each window
sizes = working_set(histograms(record), 3)
print(f"working set of 3 windows: median {int(np.median(sizes))} pages")

# %%
record.close()
