"""``python -m launch``: the same as the command ``troupe``."""

from launch.cli import main

if __name__ == "__main__":
    main()
