"""`python -m bridge_engine`."""

from bridge_engine.distributed.ranks import leave
from bridge_engine.run import main

leave(main())
