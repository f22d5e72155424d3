"""`python -m ouroboros ...`"""

import sys

from .cli import main

sys.exit(main())
