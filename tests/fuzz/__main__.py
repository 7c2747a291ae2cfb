"""Make the tests' folder importable, for this process and the workers that it starts, and run the command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.command import main  # the path comes first

if __name__ == "__main__":
    sys.exit(main())
