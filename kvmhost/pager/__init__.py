"""The pager: evicts pages of a running guest and brings them back on a touch.

Names are imported from the modules: ``options`` alone is light, and ``run`` needs it.
"""
