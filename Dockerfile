# lmcot in a container, for CPUs or for CUDA:
#
#   docker build -t lmcot:cpu .
#   docker build -t lmcot:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
# One stage: DeepSpeed builds its operators when they are first needed, with the compiler that is here.
# Ray keeps objects in shared memory: run it with --shm-size=4g or more.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

USER 1000
WORKDIR /home/ray/lmcot-src
ENV PATH=/home/ray/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

COPY --chown=ray:ray constraints.txt pyproject.toml README.md LICENSE ./
RUN python -m venv /home/ray/venv \
    && pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" torch

COPY --chown=ray:ray lmcot ./lmcot
COPY --chown=ray:ray configs ./configs
RUN pip install --no-cache-dir -c constraints.txt -e '.[aspects,openai,serve,s3,gcs]'

# The head's and the nodes' ports are those of `ray start`; the service listens where it is told.
ENTRYPOINT []
CMD ["lmcot", "--help"]
