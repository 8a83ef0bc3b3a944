#!/usr/bin/env bash
exec "$(dirname "$0")/../bench/gpu.sh" "$@"
