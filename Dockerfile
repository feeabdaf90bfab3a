# docker build -t localhost/luks-csi:0.1.0 .
# The image of every part: `luks-csi serve` and `register` on the nodes, `luks-csi controller` beside them.

FROM debian:12-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-venv \
 && python3 -m venv /opt/luks-csi \
 && python3 -m venv /opt/build
COPY requirements/runtime.txt requirements/build.txt /src/requirements/
RUN /opt/luks-csi/bin/pip install --no-cache-dir --require-hashes -r /src/requirements/runtime.txt \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r /src/requirements/build.txt \
 && /opt/luks-csi/bin/pip uninstall -y setuptools pip \
 && find /opt/luks-csi -name '*.pyi' -delete
COPY pyproject.toml hatch_build.py README.md LICENSE /src/
COPY protos /src/protos
COPY csi_driver /src/csi_driver
# A folder of its own for the package: the one layer that a change in it makes anew.
RUN cd /src \
 && /opt/build/bin/pip wheel --no-deps --no-build-isolation -w /wheels . \
 && /opt/build/bin/pip install --no-deps --no-compile --prefix=/opt/package /wheels/*.whl \
 && sed -i '1s|.*|#!/opt/luks-csi/bin/python3|' /opt/package/bin/luks-csi \
 && /opt/luks-csi/bin/python3 -m compileall -q /opt/package

FROM debian:12-slim
# More packages: "librbd1 kmod" for the backend rbd, which may have to load the module.
ARG PACKAGES=
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
    btrfs-progs ca-certificates cryptsetup-bin e2fsprogs libpython3-stdlib lvm2 python3-minimal qemu-utils \
    thin-provisioning-tools xfsprogs $PACKAGES \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*
COPY --from=build /opt/luks-csi /opt/luks-csi
COPY --from=build /opt/package /opt/luks-csi
COPY deploy/kms/pkcs11.py /usr/lib/luks-csi/kms/
LABEL org.opencontainers.image.title="luks-csi" \
      org.opencontainers.image.description="A CSI driver that gives Kubernetes encrypted volumes on any storage" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/luks-csi/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["luks-csi"]
