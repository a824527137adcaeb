# Two images of this project:
#   docker build --target test  -t longseq:test  .   the CPU suite:        docker run --rm longseq:test
#   docker build --target train -t longseq:train .   training on clusters: bash scripts/launch.sh --docker longseq:train
# A package mirror: --build-arg PIP_INDEX_URL=... (pip reads it).
ARG TEST_BASE=python:3.12-slim
# NVIDIA's image brings torch, TransformerEngine, flash-attn and apex, built for each other. Any tag whose torch is in
# setup.py's range will do; the build fails below if it is not.
ARG TRAIN_BASE=nvcr.io/nvidia/pytorch:26.06-py3

FROM ${TEST_BASE} AS test
ARG PIP_INDEX_URL
LABEL org.opencontainers.image.title="megatron-longseq-test" \
      org.opencontainers.image.description="The CPU test suite of Megatron-LongSeq" \
      org.opencontainers.image.licenses="Apache-2.0"
# VENV=none: the scripts use the Python on PATH.
ENV VENV=none PYTHONUNBUFFERED=1
WORKDIR /opt/megatron-longseq
# The lock first: the layer of the dependencies lasts until it changes.
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
RUN useradd --uid 10001 --create-home longseq && chown longseq /opt/megatron-longseq
COPY --chown=longseq . ./
USER 10001
RUN python scripts/lib/check_env.py . run data sft test dev && python -m patches verify
CMD ["bash", "scripts/test.sh"]

FROM ${TRAIN_BASE} AS train
ARG PIP_INDEX_URL
LABEL org.opencontainers.image.title="megatron-longseq-train" \
      org.opencontainers.image.description="Megatron-LongSeq on NVIDIA's PyTorch image" \
      org.opencontainers.image.licenses="Apache-2.0"
# The image pins every package through PIP_CONSTRAINT; upstream's wheel goes in without its dependencies instead, so
# that the image's torch stays as it is.
ENV VENV=none PYTHONUNBUFFERED=1 PIP_CONSTRAINT=""
ENV PYTHONPATH=/opt/megatron-longseq
WORKDIR /opt/megatron-longseq
COPY requirements.lock ./
RUN pinned() { grep -oE "^($1)==[^ ;]+" requirements.lock; } \
    && pinned megatron-core >/tmp/upstream.txt \
    && pinned "tensorboard|matplotlib|rich|tokenizers|psutil" >/tmp/tools.txt \
    && pip install --no-cache-dir --no-deps --requirement /tmp/upstream.txt \
    && pip install --no-cache-dir --requirement /tmp/tools.txt
# A user id of its own, so that nothing runs as root; the launcher replaces it by the caller's.
RUN useradd --uid 10001 --create-home longseq && chown longseq /opt/megatron-longseq
COPY --chown=longseq . ./
USER 10001
RUN python scripts/lib/check_env.py . run data && python -m patches verify
CMD ["bash", "scripts/launch.sh", "--help"]
