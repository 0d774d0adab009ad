# The images of a cluster's nodes, each with its pinned environment:
#
#     docker build --build-arg KIND=runner -t lightning-ray-runner:0.1.0 .    plays agents, and nothing else
#     docker build --build-arg KIND=gpu -t lightning-ray-gpu:0.1.0 .          head, trainer ranks and policy replicas, CUDA 13
#     docker build --build-arg KIND=cpu -t lightning-ray-cpu:0.1.0 .          the same on CPUs
#
# KIND=cpu wants PyTorch's CPU build: name an index that has it by --build-arg PIP_EXTRA_INDEX_URL=...
ARG KIND=cpu

FROM python:3.11-slim-bookworm AS system
# wget: KubeRay's probes. gcc: what Triton compiles its launchers with. libnuma, libgomp: the engine on CPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home lightning
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /app

FROM system AS runner
COPY requirements/runner.txt requirements/
RUN pip install --no-deps -r requirements/runner.txt

FROM system AS gpu
COPY requirements/gpu.txt requirements/
RUN pip install --no-deps -r requirements/gpu.txt

FROM system AS cpu
ARG PIP_EXTRA_INDEX_URL
COPY requirements/cpu.txt requirements/
RUN pip install --no-deps -r requirements/cpu.txt

FROM ${KIND}
COPY pyproject.toml README.md LICENSE ./
COPY lightning_ray lightning_ray
COPY actors actors
COPY deployments deployments
COPY examples examples
RUN pip install --no-deps --no-build-isolation -e . && python -m compileall -q . && lightning-ray --help > /dev/null
USER 1000:1000
