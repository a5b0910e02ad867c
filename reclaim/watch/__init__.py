"""The live view of a VM in a terminal."""
