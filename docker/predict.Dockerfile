# cxrfast for predicting: no torch, no compiler, no root. docker/README.md says how to build and run it.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cxr_fast ./cxr_fast
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .
# The wheel by its path: the name alone could be anybody's package. Hadolint takes the path for a name without a version.
# hadolint ignore=DL3013
RUN python -m venv --without-pip /opt/cxr-fast && \
    set -- /dist/cxr_fast-*.whl && \
    pip --python /opt/cxr-fast install --no-cache-dir "$1[cpu,dicom]"

FROM python:3.12-slim
COPY --from=build /opt/cxr-fast /opt/cxr-fast
# HOME and USER: the container may run as any user, also as one without a name.
ENV PATH=/opt/cxr-fast/bin:$PATH HOME=/tmp USER=cxrfast MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
# Whatever imports ONNX Runtime reports to nobody.
ENV ORT_DISABLE_TELEMETRY=1
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["cxrfast"]
CMD ["--help"]
