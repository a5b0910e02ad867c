"""Every option of the daemon, with its unit, its file and its flags."""
