"""Settings of the runs, one file each."""
