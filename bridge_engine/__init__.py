"""The BRIDGE training engine: knows no HTTP, no database, no queue.

`run` is a job's process, `trainer` the loop, `methods` a page each, `objectives` their mathematics.
`spec`, `models.catalog`, `events` and `errors` import no torch and are shared with the service, the
worker and the client; everything else here may.
"""

__version__ = "0.1.0"
