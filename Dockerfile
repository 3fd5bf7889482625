# syntax=docker/dockerfile:1
# This image runs every process of Expertmesh.
#   For CPUs:        docker build --tag expertmesh:0.1.0 .
#   For NVIDIA GPUs: docker build --tag expertmesh:0.1.0-gpu --build-arg ACCELERATOR=gpu .
ARG ACCELERATOR=cpu

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS python
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# The stages wheels-cpu and wheels-gpu build the packages that PyPI has only as source. The only such packages are the
# fused kernels, which need the CUDA compiler. An image for CPUs needs no fused kernels.
FROM python AS wheels-cpu
RUN mkdir /wheels

FROM nvidia/cuda:13.0.0-devel-ubuntu24.04@sha256:1e8ac7a54c184a1af8ef2167f28fa98281892a835c981ebcddb1fad04bdd452d AS cuda

# The wheels are built on the system on which they run. Wheels that were built against a newer C library, such as
# Ubuntu's, would not load. NVIDIA builds its compiler for older C libraries than both.
FROM python AS wheels-gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda PATH=/usr/local/cuda/bin:$PATH
WORKDIR /build
COPY pyproject.toml ./
# Without FORCE_BUILD both packages would download binaries that were built for other versions of torch.
ENV MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['optional-dependencies']['gpu'], sep='\n')" > gpu.txt \
    && pip install torch==2.13.0 ninja==1.13.0 packaging==25.0 setuptools==80.9.0 wheel==0.45.1 \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels --requirement gpu.txt

# hadolint ignore=DL3006
FROM wheels-${ACCELERATOR} AS wheels

FROM python AS runtime
ARG ACCELERATOR
# Package index for torch. If empty, an image for CPUs takes torch from PyTorch's own index, and an image for GPUs takes
# torch with the CUDA libraries from PyPI.
ARG TORCH_INDEX_URL=""
# KubeRay's readiness probe of a worker runs wget in bash. On a GPU, Triton compiles a launcher for each kernel at run
# time, which needs a C compiler. Versions are not pinned, because Debian keeps only the newest version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && if [ "$ACCELERATOR" = gpu ]; then apt-get install --yes --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home expertmesh
WORKDIR /app
COPY pyproject.toml ./
COPY --from=wheels /wheels /wheels
RUN case "$ACCELERATOR" in cpu) default=https://download.pytorch.org/whl/cpu ;; gpu) default=https://pypi.org/simple ;; esac \
    && pip install --no-deps --index-url "${TORCH_INDEX_URL:-$default}" torch==2.13.0 \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /wheels/requirements.txt \
    && find /wheels -name '*.whl' >> /wheels/requirements.txt \
    && pip install --requirement /wheels/requirements.txt \
    && rm -rf /wheels
COPY README.md ./
COPY protos protos
COPY model model
COPY cluster cluster
COPY services services
# Install the command `expertmesh`. The code stays in /app.
RUN pip install --no-deps --editable .

# Settings for a Ray that KubeRay starts. `expertmesh up` makes the same settings, and services/cli/main.py gives the
# reasons. hadolint takes TOKENIZERS_PARALLELISM for a secret, but the variable only concerns threads.
# hadolint ignore=DL3064
ENV PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    RAY_SERVE_LOG_TO_STDERR=0 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0 \
    OMP_WAIT_POLICY=PASSIVE \
    KMP_BLOCKTIME=0 \
    TOKENIZERS_PARALLELISM=false
USER 10001:10001
CMD ["expertmesh", "--help"]
