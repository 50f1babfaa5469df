# One image for all that runs in a cluster: its arguments say which module, as in `user_service serve`. docs/image.md has more.
# It needs BuildKit (Docker 23, or DOCKER_BUILDKIT=1) or Podman.

ARG PYTHON_IMAGE=python:3.13.15-slim-trixie
ARG UV_IMAGE=astral/uv:0.13.9

FROM ${UV_IMAGE} AS uv

FROM ${PYTHON_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
# The certificates of the base: a company's proxy is known by those.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/opt/tidings \
    UV_PYTHON_DOWNLOADS=never \
    UV_SYSTEM_CERTS=true
WORKDIR /source
# What the lock names is a layer of its own, which a change of the code leaves as it is.
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=bind,source=pyproject.toml,target=pyproject.toml \
    --mount=type=bind,source=uv.lock,target=uv.lock \
    uv sync --locked --no-dev --no-editable --no-install-project --extra services --extra mail-catcher
COPY pyproject.toml uv.lock README.md ./
COPY services services
COPY migrations migrations
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    uv sync --locked --no-dev --no-editable --extra services --extra mail-catcher \
    && rm -f /opt/tidings/.lock

FROM ${PYTHON_IMAGE}
# Nothing is installed in a container: pip and what it comes from stay behind.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/*
COPY --from=build /opt/tidings /opt/tidings
# Modules come from the image alone, never from the working directory, and only /tmp need be writable.
ENV PATH=/opt/tidings/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/tidings
USER 65532:65532
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]

ARG LICENCE=Apache-2.0
ARG REVISION=
ARG SOURCE=
ARG VERSION=
LABEL org.opencontainers.image.title="Tidings" \
      org.opencontainers.image.description="User directory, notifications and their migrations" \
      org.opencontainers.image.licenses="${LICENCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}"
