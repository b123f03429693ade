"""The BRIDGE training engine: knows no HTTP, no database, no queue.

The pages `spec`, `events`, `catalog` and `errors` import no torch and are shared with the service,
the worker and the client; everything else here may.
"""

__version__ = "0.1.0"
