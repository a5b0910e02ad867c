"""The C core. Nothing imports the extension but ``kvmhost._ffi``."""
