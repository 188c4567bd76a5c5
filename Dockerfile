# OneCard as an image. Never built or run where it was written: no container there. Its pip lines are tested without one.
#
# For an NVIDIA card (driver 580 or newer, and the NVIDIA Container Toolkit), then for a machine without one:
#   docker build -t onecard .
#   docker build -t onecard --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# Results and downloaded models stay outside of the container; its user is number 1000:
#   docker run --rm -it --gpus all -v "$PWD/outputs:/data/outputs" -v onecard-models:/data/huggingface \
#       onecard finetune --output_path outputs/first
# Nothing listens unless it is asked to, and what other machines can reach needs a key:
#   docker run --rm --gpus all -v "$PWD/outputs:/data/outputs" -p 127.0.0.1:8000:8000 \
#       onecard serve --lora_path outputs/first --host 0.0.0.0 --api_key SECRET
ARG BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /usr/local/onecard \
    && install -d -o 1000 -g 1000 /data /data/outputs /data/huggingface
ENV PATH=/usr/local/onecard/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/data HF_HOME=/data/huggingface

# Packages first: a change of the program alone does not download them again.
WORKDIR /usr/local/src/onecard
COPY requirements.txt ./
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then pip install "$(grep '^torch==' requirements.txt)" --index-url "$TORCH_INDEX"; fi \
    && pip install -r requirements.txt
COPY pyproject.toml requirements-*.txt README.md LICENSE ./
COPY docs/README_zh.md docs/
COPY tools/tiny_corpus tools/tiny_corpus
COPY config-sample config-sample
COPY field-recipes field-recipes
COPY sample sample
COPY onecard onecard
RUN pip install .

USER 1000:1000
WORKDIR /data
VOLUME ["/data/outputs", "/data/huggingface"]
ENTRYPOINT ["onecard"]
CMD ["--help"]
