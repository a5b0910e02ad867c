"""The daemon's options: definitions, configuration file and flags."""
