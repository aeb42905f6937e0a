#!/usr/bin/env bash
# Shows within an hour what a real GPU makes of mixchat, and writes one report.
#
#     tests/gpu.sh [STEP...] [--paper] [--report FILE]    (tests/gpu.sh --help has them all)
#
# PYTHON names the Python with mixchat and its tests' packages, LLAMA_PYTHON one with llama-cpp-python
# built for the GPU, and gguf.
exec "${PYTHON:-python}" "$(dirname "$0")/tools/gpu_steps.py" "$@"
