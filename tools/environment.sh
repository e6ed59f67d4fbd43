# Sourced by tools/quickstart and tools/test: makes .venv with the pinned dependencies and kerasllm in it.
# Nothing is installed outside of the repository's .venv. The second call only compares a checksum.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${KERASLLM_VENV:-$repository/.venv}"
constraints="$(realpath "${KERASLLM_CONSTRAINTS:-$repository/constraints.txt}")"

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "kerasllm: Python 3.11 is needed (constraints.txt pins wheels for it). Found none on PATH;" \
    "set PYTHON to one." >&2
  return 1
}

prepare_environment() {
  local wanted stamp="$environment/kerasllm.stamp" python
  wanted="$(cd "$repository" && cat setup.cfg pyproject.toml "$constraints" | cksum) $repository"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python="$(find_python)"
  echo "kerasllm: setting up $environment (once; a few minutes for TensorFlow's wheels)" >&2
  rm -f "$stamp"
  "$python" -m venv --clear "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "$repository[serving,litert,grammar,telemetry,test]"
  echo "$wanted" > "$stamp"
}

# Adds an extra of setup.cfg to the environment, once.
install_extra() {
  local stamp="$environment/kerasllm.$1.stamp"
  if ! cmp --silent "$stamp" "$environment/kerasllm.stamp"; then
    echo "kerasllm: adding the extra $1 to $environment" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$constraints" --editable "$repository[$1]"
    cp "$environment/kerasllm.stamp" "$stamp"
  fi
}

# Tests start dozens of processes, and each would compile every module again.
unset PYTHONDONTWRITEBYTECODE
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
export KERAS_BACKEND=tensorflow # the only one that exports and serves
prepare_environment
