# ovserve with its built-in model. docs/install.md tells how to build and run it.
FROM debian:12-slim

# Further Debian packages, such as the drivers of a GPU: docker build --build-arg PACKAGES=intel-opencl-icd
ARG PACKAGES=""
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv $PACKAGES \
    && rm -rf /var/lib/apt/lists/*

# The user has no rights in the image but for its own folder: pictures that are answered as addresses, and compiled models.
RUN useradd --uid 10001 --user-group --create-home --home-dir /var/lib/ovserve --shell /usr/sbin/nologin ovserve

COPY pyproject.toml constraints.txt LICENSE /usr/src/ovserve/
COPY docs/package.md /usr/src/ovserve/docs/
COPY ovserve /usr/src/ovserve/ovserve
RUN python3 -m venv /opt/ovserve \
    && /opt/ovserve/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint /usr/src/ovserve/constraints.txt /usr/src/ovserve \
    && rm -rf /usr/src/ovserve

USER ovserve
WORKDIR /var/lib/ovserve
VOLUME /var/lib/ovserve
ENV OVSERVE_HOST=0.0.0.0 \
    OVSERVE_STORE_DIR=/var/lib/ovserve/pictures
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["/opt/ovserve/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["/opt/ovserve/bin/python", "-P", "-m", "ovserve"]
