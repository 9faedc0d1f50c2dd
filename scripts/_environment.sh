# Sourced by the scripts beside it. Makes the virtual environment they share and leaves its interpreter in $python.
#
# The first call installs; later calls compare a stamp and return at once. What decides the stamp is what decides the
# installation: pyproject.toml, the interpreter, the torch asked for, and the extras.
#
#   FLASH_ATTN_CUTE_VENV    where the environment lives (default: .venv in the repository)
#   FLASH_ATTN_CUTE_TORCH   the torch to ask pip for (default: below)
#   PYTHON                  the interpreter to make it with (default: the first python3 that is 3.10 or newer)

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FLASH_ATTN_CUTE_VENV:-$repository/.venv}"
python="$venv/bin/python"

find_interpreter() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.10 or newer was found (tried ${PYTHON:-python3 and python3.10 to python3.13}); set PYTHON." >&2
    return 1
}

# The newest CUDA release that the driver supports, as its major number; nothing where there is no NVIDIA GPU.
driver_cuda_major() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 || return 0
    nvidia-smi | sed -nE 's/.*CUDA[A-Za-z ]*Version *: *([0-9]+).*/\1/p' | head -n 1
}

prepare_environment() {
    local interpreter cuda torch extras wanted stamp="$venv/.flash_attn_cute_installed"
    interpreter="$(find_interpreter)" || return 1
    cuda="$(driver_cuda_major)"
    extras="dev"
    if [ -z "$cuda" ]; then
        # One exact version: it is the one that machines without a GPU may carry as a small CPU-only build.
        torch="${FLASH_ATTN_CUTE_TORCH:-torch==2.13.0}"
    else
        torch="${FLASH_ATTN_CUTE_TORCH:-torch}"
        # pyproject.toml says why the DSL's CUDA 13 compiler is worth having on such a driver.
        [ "$cuda" -ge 13 ] && extras="dev,cu13"
    fi
    wanted="$({
        cat "$repository/pyproject.toml"
        "$interpreter" -c 'import sys; print(sys.version, sys.prefix)'
        echo "$repository $torch $extras"
    } | "$interpreter" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi

    echo "Installing into $venv: $torch, flash-attn-cute[$extras]. This takes minutes the first time only." >&2
    rm -f "$stamp"
    # Made over whatever is there: pip then changes only what has to, and nobody's environment is ever wiped.
    if ! "$interpreter" -m venv "$venv"; then
        echo "Making a virtual environment failed; on Debian and Ubuntu the package python3-venv is needed for it." >&2
        return 1
    fi
    local quiet="--quiet"
    [ -t 2 ] && quiet=""
    "$python" -m pip install $quiet --disable-pip-version-check "$torch" --editable "$repository[$extras]" || return 1
    echo "$wanted" >"$stamp"
}
