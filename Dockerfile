# An image to train in: docs/container.md says how to build it and how to run it. Build arguments:
#   BASE         a Debian image with Python 3.11 or newer and pip
#   TORCH        which build of torch: cpu, or one for CUDA, such as cu130
#   TORCH_INDEX  where pip finds it; empty: where pip looks for everything
#   PACKAGES     more of Debian's packages, such as g++, which training.compile needs
#   COMMIT       of this folder, for the records that runs keep
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# The project itself, apart from what it needs: a change of the code makes a small layer.
FROM ${BASE} AS project
WORKDIR /aaae
COPY launch launch
COPY configs configs
WORKDIR /source
COPY pyproject.toml README.md ./
COPY aaae_dist aaae_dist
RUN python3 -m venv --without-pip /venv \
    && python3 -m pip --python /venv/bin/python3 install --no-cache-dir --no-compile --no-deps . \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /venv/lib \
    && mkdir /venv/first \
    && ln -s /venv/lib/python3*/site-packages/aaae_dist /venv/first/ \
    && chmod -R a+rX /aaae

FROM ${BASE}
ARG PACKAGES=
# hadolint ignore=DL3008  # a pinned version is gone from Debian's servers with the next security update
RUN apt-get update \
    && apt-get install --yes --no-install-recommends iproute2 ${PACKAGES} \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp aaae \
    && install --directory --mode 1777 /cache

# torch comes from its own index alone, the rest from PyPI alone. What packages test themselves with is left out, a tenth of
# it all. Bytecode is made here, for nobody can write it later, and is not held against times of files, which tools change;
# only that of a file for newer Pythons is not.
WORKDIR /aaae
COPY pyproject.toml constraints.txt ./
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
RUN add() { python3 -m pip --python /venv/bin/python3 install --no-cache-dir --no-compile --constraint constraints.txt "$@"; } \
    && export DS_BUILD_OPS=0 \
    && python3 -m venv --without-pip /venv \
    && add --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "$(grep '^torch==' constraints.txt)+${TORCH}" \
    && python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], *project["optional-dependencies"]["deepspeed"], sep="\n")' > /tmp/needed \
    && add --requirement /tmp/needed \
    && rm /tmp/needed \
    && find /venv/lib \( -name test -o -name tests \) -type d -prune -exec rm -r {} + \
    && find /venv/lib/*/site-packages/torch/bin -name '*test*' -delete \
    && python3 -m compileall -q -j 0 -x /py312_ --invalidation-mode unchecked-hash /venv/lib

COPY --from=project /venv /venv
COPY --from=project /aaae /aaae
ARG COMMIT=
LABEL org.opencontainers.image.title="aaae_dist" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
# What is written outside of the run's folder goes to /tmp, and shards to /cache. The code that runs is the image's, even in
# a folder that has it too, as a SLURM job's: Python puts that on its path, unless it is to be safe, and so does accelerate.
ENV PATH=/venv/bin:$PATH \
    VENV=/venv \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    AAAE_COMMIT=${COMMIT} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONPATH=/venv/first
USER 10001:10001
ENTRYPOINT ["aaae"]
