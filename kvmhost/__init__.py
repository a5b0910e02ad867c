"""A userspace KVM host: guests on /dev/kvm, their page tables, and reclaim.

Importing this package imports no extension module and no numpy; see
:class:`kvmhost.machine.base.Machine` for where to start.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
