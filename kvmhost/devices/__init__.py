"""Devices: the port and MMIO bus, the serial port, the exit ports."""
