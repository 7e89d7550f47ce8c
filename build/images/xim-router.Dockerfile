# The local router.
#   docker build -f build/images/xim-router.Dockerfile -t ghcr.io/xerotier/container-agents/xim-router .
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
 && install -d -o 5152 -g 5152 -m 0700 /var/lib/router
COPY --from=agent /opt/xerotier /opt/xerotier
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="xim-router" \
      org.opencontainers.image.description="Router for XIM agents" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="https://github.com/xerotier/container-agents" \
      org.opencontainers.image.version="${VERSION}"
ENV HOME=/var/lib/inference \
    LANG=C.UTF-8 \
    PATH=/opt/xerotier:${PATH}
USER 5152:5152
WORKDIR /var/lib/inference
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
  CMD ["/opt/xerotier/xerotier-xim-agent", "healthcheck", "--metrics-port", "8080", "--path", "/dashboard/"]
ENTRYPOINT ["/opt/xerotier/xerotier-xim-agent", "router"]
# Agents find it by this name on a network of containers; another --public-url for others.
CMD ["serve", "--listen", "0.0.0.0:8080", "--public-url", "http://router:8080", "--data", "/var/lib/router"]
