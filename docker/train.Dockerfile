# cxrfast for training on an NVIDIA GPU. CUDA comes with torch's wheels, the driver from the host. Not run on a GPU yet.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cxr_fast ./cxr_fast
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .
# The wheel by its path: the name alone could be anybody's package. Hadolint takes the path for a name without a version.
# torch>=2.15: the CUDA libraries of the extra `gpu` are those of CUDA 13, an older torch is built on CUDA 12.
# hadolint ignore=DL3013
RUN python -m venv --without-pip /opt/cxr-fast && \
    set -- /dist/cxr_fast-*.whl && \
    pip --python /opt/cxr-fast install --no-cache-dir "$1[train,gpu,dicom,parquet]" "torch>=2.15"

FROM python:3.12-slim
COPY --from=build /opt/cxr-fast /opt/cxr-fast
# HOME and USER: the container may run as any user, also as one without a name. HF_HOME is a folder to mount.
ENV PATH=/opt/cxr-fast/bin:$PATH HOME=/tmp USER=cxrfast MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/hub
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONDONTWRITEBYTECODE=1
# Whatever imports ONNX Runtime reports to nobody.
ENV ORT_DISABLE_TELEMETRY=1
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["cxrfast"]
CMD ["--help"]
