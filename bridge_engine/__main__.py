"""`python -m bridge_engine`."""

import sys

from bridge_engine.run import main

sys.exit(main())
