"""The commands of kvmhost, one module per command."""
