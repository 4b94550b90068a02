#!/bin/sh
# Makes .venv and installs the project from the lock, once. Called by the Makefile; safe to call again and again:
# while the lock and the metadata are unchanged it does nothing and needs no network.
#   PYTHON       the Python to use (3.11 or later); found by itself otherwise
#   TORCH_INDEX  a package index that holds the torch you want, e.g. https://download.pytorch.org/whl/cu130
set -eu
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

hash=$(cat constraints.txt settings.ini setup.py | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.installed 2>/dev/null || true)" = "$hash" ]; then exit 0; fi

if [ ! -x .venv/bin/python ]; then
    ok='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
    for p in ${PYTHON:-python3.11 python3.12 python3 python3.13 python}; do
        if command -v "$p" >/dev/null 2>&1 && "$p" -c "$ok" 2>/dev/null; then py=$p; break; fi
    done
    [ -n "${py:-}" ] || die "no Python 3.11 to 3.13 found: install one, or name it with 'make PYTHON=/path/to/python ...'"
    say "making .venv with $("$py" --version) ($(command -v "$py"))"
    "$py" -m venv .venv || { rm -rf .venv; die "'$py -m venv' failed: on Debian and Ubuntu, install the package python3-venv"; }
fi
pip="./.venv/bin/python -m pip install --disable-pip-version-check --quiet"

torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)
index=
if [ -n "${TORCH_INDEX:-}" ]; then index="--extra-index-url $TORCH_INDEX"
elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    # Without a GPU the CPU build spares several GB; PyTorch's own index has it, and some mirrors do.
    cpu=https://download.pytorch.org/whl/cpu
    probe="import urllib.request as u; u.urlopen('$cpu/torch/', timeout=5).read(1)"
    if ./.venv/bin/python -c "$probe" >/dev/null 2>&1; then index="--extra-index-url $cpu"; fi
fi
say "installing $torch $index (once; the download is the long part)"
$pip -c constraints.txt --upgrade pip  # old ones stumble over some of the metadata
$pip -c constraints.txt setuptools wheel "$torch" $index
say "installing everything else from constraints.txt"
# no build isolation: what must be built is built with the locked tools and sees the torch installed above
$pip -c constraints.txt --no-build-isolation --editable '.[all,dev]' $index
echo "$hash" > .venv/.installed
say "environment ready: .venv"
