"""``python -m qkov_dist`` is ``qkov``."""

import sys

from .cli import main

sys.exit(main())
