# An image with the command scimult. It is not part of the tests.
#
#   docker build -t scimult .                                  CPU
#   docker build -t scimult --build-arg EXTRAS=gpu .           CUDA, for a host with NVIDIA's container toolkit
#   docker run --rm -v "$PWD:/work" [--gpus all] scimult train moe
FROM python:3.11-slim

ARG EXTRAS=cpu
WORKDIR /src
COPY constraints.txt setup.cfg pyproject.toml scimult.py README.md LICENSE ./
COPY datamodules datamodules
COPY lightning_modules lightning_modules
COPY experiments experiments
# torch comes from PyPI with CUDA, and from its own index without.
RUN if [ "$EXTRAS" != gpu ]; then \
        pip install --no-cache-dir -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu; \
    fi && pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# runs/ and data go to the folder that is mounted here.
WORKDIR /work
ENV HOME=/work
ENTRYPOINT ["scimult"]
CMD ["--help"]
