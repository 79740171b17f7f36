"""`python -m racecore` is `racecore`."""

import sys

from racecore.cli import main

if __name__ == "__main__":
    sys.exit(main())
