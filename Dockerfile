# llama-zh on a CPU: an OpenAI-compatible server for one model folder, which is mounted, not copied.
#   docker build -t llama-zh .
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./runs/mini/chat:/models/chat:ro llama-zh
FROM python:3.11-slim

# PyTorch's own index has the build without CUDA; it spares several GB. Empty: whatever the default index gives.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,rag
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

RUN useradd --create-home --uid 1000 app
WORKDIR /opt/llama-zh

# The long part first: a change in our code does not repeat it.
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools wheel torch ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}

COPY settings.ini setup.py MANIFEST.in README.md LICENSE ./
COPY llama_zh_nb ./llama_zh_nb
RUN pip install -c constraints.txt --no-build-isolation ".[$EXTRAS]" ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}

USER app
WORKDIR /home/app
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]

# In a container 127.0.0.1 is the container: the server must listen on all of its addresses.
# Who reaches it is decided outside, by -p: publish on 127.0.0.1 unless the whole network may ask.
CMD ["llama-zh", "serve", "/models/chat", "--host", "0.0.0.0", "--port", "8000"]
