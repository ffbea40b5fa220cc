"""`python -m tokeff`."""

import sys

from tokeff.cli import main

sys.exit(main())
