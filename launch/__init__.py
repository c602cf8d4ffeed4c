"""The command line, the run's configuration and the drivers."""
