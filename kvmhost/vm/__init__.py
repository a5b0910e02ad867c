"""What any VM takes and returns, whether a machine is asked, its client or a process.

:mod:`.names` has the names that choose something, :mod:`.harvest` the arguments and the
result of a harvest. Importing these modules imports no numpy.
"""

from kvmhost.vm.harvest import Harvest, Harvestable, HarvestRequest

__all__ = ["Harvest", "HarvestRequest", "Harvestable"]
