"""What comes in, as Arrow tables."""
