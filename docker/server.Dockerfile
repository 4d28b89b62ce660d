# syntax=docker/dockerfile:1
# A gated MLflow server: extra `gate` (MLflow, no torch), PostgreSQL and S3 clients.
#   docker build -f docker/server.Dockerfile -t mlflow-kdguard-server:0.1.0 .
# docker/README.md says how to pin the base image by its digest.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements/build.txt docker/requirements/server.txt /src/docker/requirements/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --requirement /src/docker/requirements/build.txt \
    && python -m venv /opt/kdguard \
    && /opt/kdguard/bin/pip install --no-cache-dir --requirement /src/docker/requirements/server.txt
COPY pyproject.toml README.md LICENSE /src/
COPY mlflow_kdguard /src/mlflow_kdguard
COPY cli /src/cli
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /src/dist /src \
    && /opt/kdguard/bin/pip install --no-cache-dir --no-deps /src/dist/*.whl \
    && /opt/kdguard/bin/pip check \
    && /opt/kdguard/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE} AS server
# No account is made: a number is enough, and MLflow asks for names through these variables.
ENV PATH=/opt/kdguard/bin:$PATH \
    HOME=/tmp \
    USER=kdguard \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    KDGUARD_SERVER=/etc/kdguard/server.yaml
COPY --from=build /opt/kdguard /opt/kdguard
COPY --chmod=0555 docker/entrypoint.sh /usr/local/bin/kdguard-entrypoint
RUN install -d -o 10001 -g 10001 -m 0750 /srv/kdguard-content /var/lib/kdguard
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}/health/ready\", timeout=4)"]
ENTRYPOINT ["kdguard-entrypoint"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--app-name", "kdguard", "--workers", "2"]
