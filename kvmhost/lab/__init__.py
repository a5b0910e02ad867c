"""Emulated hosts: unmodified kernels under QEMU, with a KVM of their own that runs guests.

:mod:`hosts` describes them, :mod:`fetching` downloads what they need, :mod:`running` boots one
and runs a command inside. See docs/lab.md.
"""
