"""The roles of a run, one file each, and the two engines they stand on."""
