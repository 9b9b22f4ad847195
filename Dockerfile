# The book's environment, from its lock: JupyterLab on port 8888, or any command of make.
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium gcc git libc6-dev make npm \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home reader \
    && install --directory --owner=reader /book /book/_build
USER reader
WORKDIR /book
# an index with CPU builds of PyTorch, which are smaller: --build-arg
ARG PIP_EXTRA_INDEX_URL
COPY --chown=reader Makefile requirements*.txt requirements*.lock pyproject.toml README.md LICENSE ./
COPY --chown=reader src src
RUN make setup .venv/lab/.ready
COPY --chown=reader . .
RUN touch .venv/.ready .venv/lab/.ready
EXPOSE 8888
# reached from outside of the container by the port that was published for it alone
CMD ["make", "lab", "OPTIONS=--no-browser --ServerApp.ip=0.0.0.0"]
