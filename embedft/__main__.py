"""`python -m embedft` is the command `embedft`."""

import sys

from embedft.cli import main

sys.exit(main())
