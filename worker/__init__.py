"""Takes jobs and supervises engine processes. Loads no model itself: it never imports torch.

`execute.py` is the page to read first. A job comes to it by a message (`tasks.py`, fed by
`relay.py`) or by a look into the database (`local.py`); both are hints, the database is the truth.
"""
