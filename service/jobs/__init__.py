"""Jobs over HTTP: submit, look at, follow, cancel."""
