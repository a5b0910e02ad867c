"""The pager: evicts pages of a running guest and restores them at the next touch.

Names are imported from the modules: ``options`` alone is light, and ``run`` needs it.
"""
