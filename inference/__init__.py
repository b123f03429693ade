"""The local inference process: base models and LoRA adapters behind vLLM's HTTP shapes.

Runs as a process of its own, so that nothing else of the service loads torch. The service speaks to
it over loopback HTTP and could speak to a vLLM server in its place.
"""
