# Copy to /shared/cxr-fast/ beside the environment .venv and the token ray_token; on-premises.yaml says how they come there.
source /shared/cxr-fast/.venv/bin/activate
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/shared/cxr-fast/ray_token
