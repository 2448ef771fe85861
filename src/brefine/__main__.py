"""``python -m brefine`` is the command ``brefine``."""

import sys

from brefine.cli import main

sys.exit(main())
