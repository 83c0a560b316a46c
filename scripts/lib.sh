# The set-up that scripts/serve and scripts/test share: a virtual environment with pinned packages, made once.
# Sourced by bash, from the repository's root. Needs: Python 3.11 or later, or the rights to install it.

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local name
    for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# Debian's python3 may come without venv and pip: install what is missing when we may, else print the one command that does.
need_packages() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing $* (Debian packages) ..."
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; } >&2
    else
        say "Missing: $*. Install with:  sudo apt-get install -y $*"
        exit 1
    fi
}

# set_up ENVIRONMENT EXTRA: make ENVIRONMENT, install ovserve (editable) with EXTRA ("" or "[test]") at the pinned versions.
# A stamp with the checksum of what was asked for makes a second run take no time.
set_up() {
    local environment=$1 extra=$2 python wanted stamp
    wanted=$(cat pyproject.toml constraints.txt scripts/lib.sh | cksum)
    for stamp in "$environment/ovserve-stamp$extra" "$environment/ovserve-stamp[test]"; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    done
    find_python >/dev/null || need_packages python3
    python=$(find_python) || { say "Python 3.11 or later is needed; PYTHON may name one."; exit 1; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
    say "Making the virtual environment $environment with $("$python" --version) ..."
    # An interrupted run may have left an environment without pip: it is made anew.
    "$environment/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$environment"
    # pip's resolver can backtrack for minutes on this set of packages; uv takes seconds.
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
    say "Installing ovserve$extra and its packages at the versions of constraints.txt ..."
    "$environment/bin/uv" pip install --quiet --python "$environment/bin/python" --constraint constraints.txt --editable ".$extra"
    printf '%s' "$wanted" > "$environment/ovserve-stamp$extra"
    say "Set-up done."
}

# set_up_clients ENVIRONMENT: the other official clients that the tests talk to the server with, inside ENVIRONMENT.
set_up_clients() {
    local environment=$1 wanted
    wanted=$(cat tests/e2e/node/package.json tests/e2e/node/package-lock.json scripts/lib.sh | cksum)
    [ "$(cat "$environment/clients-stamp" 2>/dev/null)" = "$wanted" ] && return
    command -v npm >/dev/null || need_packages npm
    say "Installing the Node clients of tests/e2e/node ..."
    mkdir -p "$environment/node"
    cp tests/e2e/node/package.json tests/e2e/node/package-lock.json "$environment/node/"
    (cd "$environment/node" && npm ci --no-audit --no-fund --loglevel=error >&2)
    say "Installing the last Python client of the first major version ..."
    "$environment/bin/uv" venv --quiet --allow-existing "$environment/openai1"
    "$environment/bin/uv" pip install --quiet --python "$environment/openai1/bin/python" openai==1.109.1 "httpx==0.28.1"
    say "Installing LiteLLM ..."
    "$environment/bin/uv" venv --quiet --allow-existing "$environment/litellm"
    "$environment/bin/uv" pip install --quiet --python "$environment/litellm/bin/python" litellm==1.110.2 openai==3.57.0
    printf '%s' "$wanted" > "$environment/clients-stamp"
}

# set_up_proxies: the proxies that the tests put in front of the server, and the programs that the examples of docs/clients.md use.
set_up_proxies() {
    PATH=$PATH:/usr/sbin
    command -v nginx >/dev/null || need_packages nginx-light
    command -v haproxy >/dev/null || need_packages haproxy
    command -v curl >/dev/null || need_packages curl
    command -v jq >/dev/null || need_packages jq
}
