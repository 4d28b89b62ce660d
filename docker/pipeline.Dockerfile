# syntax=docker/dockerfile:1
# The pipeline (extra `all`), for the CPU and for CUDA:
#   docker build -f docker/pipeline.Dockerfile --target cpu  -t mlflow-kdguard:0.1.0-cpu  .
#   docker build -f docker/pipeline.Dockerfile --target cuda -t mlflow-kdguard:0.1.0-cuda .
# CUDA's libraries come with torch's wheels; the host brings the driver (NVIDIA container toolkit).
# docker/README.md says how to pin the base image by its digest.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements/build.txt /src/docker/requirements/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --requirement /src/docker/requirements/build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY mlflow_kdguard /src/mlflow_kdguard
COPY cli /src/cli
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /src/dist /src

FROM ${PYTHON_IMAGE} AS shared
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements/pipeline.txt /src/docker/requirements/
RUN python -m venv /opt/kdguard \
    && /opt/kdguard/bin/pip install --no-cache-dir --requirement /src/docker/requirements/pipeline.txt

FROM shared AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/requirements/torch-cpu.txt /src/docker/requirements/
RUN /opt/kdguard/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" \
        --requirement /src/docker/requirements/torch-cpu.txt
COPY --from=wheel /src/dist /src/dist
RUN /opt/kdguard/bin/pip install --no-cache-dir --no-deps /src/dist/*.whl \
    && /opt/kdguard/bin/kdguard doctor \
    && /opt/kdguard/bin/pip uninstall --yes pip

FROM shared AS build-cuda
COPY docker/requirements/torch-cuda.txt /src/docker/requirements/
RUN /opt/kdguard/bin/pip install --no-cache-dir \
        --requirement /src/docker/requirements/torch-cuda.txt
COPY --from=wheel /src/dist /src/dist
RUN /opt/kdguard/bin/pip install --no-cache-dir --no-deps /src/dist/*.whl \
    && /opt/kdguard/bin/kdguard doctor \
    && /opt/kdguard/bin/pip uninstall --yes pip

# What both have in common. Work goes to /work, which an unprivileged user may write.
FROM ${PYTHON_IMAGE} AS pipeline
ENV PATH=/opt/kdguard/bin:$PATH \
    HOME=/tmp \
    USER=kdguard \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true
RUN install -d -o 10001 -g 10001 -m 0750 /work
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s --retries=2 \
    CMD ["kdguard", "--version"]
CMD ["kdguard", "--help"]

FROM pipeline AS cpu
COPY --from=build-cpu /opt/kdguard /opt/kdguard
USER 10001:10001

FROM pipeline AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/kdguard /opt/kdguard
USER 10001:10001
