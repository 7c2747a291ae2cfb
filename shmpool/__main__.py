"""``python -m shmpool``."""

import sys

from shmpool.cli import main

# No exit if all is well: with `python -i`, that would be an error.
if __name__ == "__main__" and (code := main(sys.argv[1:])):
    sys.exit(code)
