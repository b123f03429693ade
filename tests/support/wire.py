"""A transport that meddles with requests on their way to a real server."""

import json

import httpx


class Meddling(httpx.BaseTransport):
    """Sends what `change(path, body)` makes of each POST that has a body; where that is a Response,
    answers it without asking the server. Remembers what was asked."""

    def __init__(self, change=lambda path, body: body):
        self.change = change
        self.inner = httpx.HTTPTransport()
        self.asked = []
        self.swallowed = {}

    def handle_request(self, request):
        """httpx calls this for every request."""
        if request.url.path in self.swallowed:
            return self.swallowed[request.url.path]
        if request.method == "POST" and request.content:
            body = json.loads(request.content)
            self.asked.append((request.url.path, body))
            changed = self.change(request.url.path, dict(body))
            if isinstance(changed, httpx.Response):
                changed.request = request
                return changed
            request = httpx.Request("POST", request.url, json=changed)
        return self.inner.handle_request(request)

    def swallow(self, path, answer):
        """From now on requests to this path are answered so, and never arrive."""
        self.swallowed[path] = answer

    def posted(self, path):
        """The bodies sent to this path."""
        return [body for asked, body in self.asked if asked == path]

    def close(self):
        """Closes the connections."""
        self.inner.close()
