# shellcheck shell=bash
# Set-up shared by the other scripts: virtual environments with pinned packages, and the programs that the tests start.
# Sourced by bash in the repository's root. Everything is put into .venv*; a second run with nothing to do takes no time.

PROGRAMS=$PWD/.venv/programs  # programs that this machine lacks, extracted from Debian packages; tests/conftest.py puts bin/ on PATH
PATH=$PATH:/usr/sbin:$PROGRAMS/bin

# Many containers set PYTHONDONTWRITEBYTECODE. The tests start some hundred processes, and each would compile all its modules anew:
# 0.7 s of a processor for a server, 8 s for a process of pytest-xdist. So bytecode is kept, but outside of the source folders.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX=$PWD/.venv/bytecode
fi

# Arguments of pytest that run test files in parallel. Half of the time of the tests is waiting, so there are more processes than cores.
# Not many more, because some tests watch the clock.
# shellcheck disable=SC2034  # the scripts use it
parallel=(-n "$((($(nproc) * 3 + 1) / 2))" --maxprocesses 6 --dist loadfile)

say() { printf '%s\n' "$*" >&2; }

# find_python: print the interpreter to use: PYTHON where it is set, else the first one that is Python 3.11 or later.
find_python() {
    local name names=(python3 python3.13 python3.12 python3.11)
    if [ -n "${PYTHON:-}" ]; then
        names=("$PYTHON")
    fi
    for name in "${names[@]}"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# find_version X.Y: print an interpreter of that version: one on PATH, else one that uv or pyenv has put on this machine.
# find_version system: print the distribution's own interpreter if it is Python 3.11 or later. Its patch release may be older.
find_version() {
    local name
    if [ "$1" = system ]; then
        PYTHON=/usr/bin/python3 find_python
        return
    fi
    for name in "python$1" "$(.venv/bin/uv python find --no-python-downloads "$1" 2>/dev/null)" \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [ "$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# require NAME...: make sure that this machine has everything named, or can get it: "python" (3.11 or later, with venv) or a program.
# Collects all that is missing before it does anything. As root on Debian or Ubuntu it installs the packages in one step, else it
# prints one command and ends. Packages that start services are not installed: see set_up_programs.
require() {
    local name python missing=()
    for name; do
        case $name in
            python)
                if ! python=$(find_python); then
                    [ -z "${PYTHON:-}" ] || { say "PYTHON is $PYTHON, which is not Python 3.11 or later."; exit 1; }
                    missing+=(python3 python3-venv)
                elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
                    missing+=("${python##*/}-venv")  # Debian's python3 comes without venv and pip
                fi
                ;;
            chromium)
                command -v chromium >/dev/null || command -v chromium-browser >/dev/null || missing+=(chromium)
                ;;
            nginx | haproxy | caddy | curl | jq)
                command -v "$name" >/dev/null || command -v apt-get >/dev/null || missing+=("$name")
                ;;
            *)
                command -v "$name" >/dev/null || missing+=("$name")
                ;;
        esac
    done
    if [ ${#missing[@]} = 0 ]; then
        return
    fi
    if ! command -v apt-get >/dev/null; then
        say "Missing: ${missing[*]}. Install them with this machine's package manager, then run the script again."
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        say "Missing: ${missing[*]}. Install them, then run the script again:"
        say "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
        exit 1
    fi
    say "Installing Debian packages: ${missing[*]} ..."
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# is_current STAMP FILE...: whether STAMP holds the checksum of the files, and so whether what they ask for is installed.
is_current() {
    [ "$(cat "$1" 2>/dev/null)" = "$(cat "${@:2}" | cksum)" ]
}

# has_packages ENVIRONMENT EXTRA: whether set_up has nothing to do.
has_packages() {
    local stamp
    for stamp in "$1/ovserve-stamp$2" "$1/ovserve-stamp[test]"; do
        if is_current "$stamp" pyproject.toml constraints.txt scripts/lib.sh; then
            return
        fi
    done
    return 1
}

# set_up ENVIRONMENT EXTRA: make ENVIRONMENT and install ovserve (editable) with EXTRA ("" or "[test]") at the pinned versions.
set_up() {
    local environment=$1 extra=$2 python
    if has_packages "$environment" "$extra"; then
        return
    fi
    require python
    python=$(find_python) || { say "Python 3.11 or later is required; PYTHON may name one."; exit 1; }
    # An interrupted run may leave an environment without pip.
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        say "Making the virtual environment $environment with $("$python" --version) ..."
        "$python" -m venv --clear "$environment"
    fi
    say "Installing ovserve$extra and its packages at the versions of constraints.txt ..."
    # pip's resolver can backtrack for minutes on this set of packages; uv takes seconds.
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
    "$environment/bin/uv" pip install --quiet --python "$environment/bin/python" --constraint constraints.txt --editable ".$extra"
    cat pyproject.toml constraints.txt scripts/lib.sh | cksum > "$environment/ovserve-stamp$extra"
}

# has_clients ENVIRONMENT: whether set_up_clients has nothing to do.
has_clients() {
    is_current "$1/clients-stamp" tests/e2e/node/package.json tests/e2e/node/package-lock.json scripts/lib.sh
}

# set_up_clients ENVIRONMENT: install the other clients that the tests send requests with inside ENVIRONMENT. Needs npm.
set_up_clients() {
    local environment=$1
    if has_clients "$environment"; then
        return
    fi
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
    cat tests/e2e/node/package.json tests/e2e/node/package-lock.json scripts/lib.sh | cksum > "$environment/clients-stamp"
}

# package_of PROGRAM: print the Debian package that contains it, and one that the tests need beside it.
package_of() {
    case $1 in
        nginx) printf '%s\n' nginx libnginx-mod-stream ;;
        promtool) echo prometheus ;;
        *) echo "$1" ;;
    esac
}

# set_up_programs PROGRAM...: put the programs that this machine lacks into .venv/programs.
# Debian's packages of nginx, haproxy and caddy enable and start a service when they are installed, so they are only downloaded and
# extracted, with the libraries that are missing too. A wrapper in .venv/programs/bin starts each program. Needs apt-get, not root.
set_up_programs() {
    local name missing=() packages libraries
    for name; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    if [ ${#missing[@]} = 0 ]; then
        return
    fi
    say "Extracting into .venv/programs (nothing is installed in the system): ${missing[*]} ..."
    mapfile -t packages < <(for name in "${missing[@]}"; do package_of "$name"; done)
    download_packages "$PROGRAMS/work" "${packages[@]}"
    mkdir -p "$PROGRAMS/root" "$PROGRAMS/bin"
    for name in "$PROGRAMS"/work/*.deb; do
        dpkg -x "$name" "$PROGRAMS/root"
    done
    rm -r "$PROGRAMS/work"
    libraries=$(find "$PROGRAMS/root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
    for name in "${missing[@]}"; do
        write_wrapper "$name" "$libraries"
    done
}

# download_packages FOLDER PACKAGE...: download the packages, and those they depend on that are not installed, into FOLDER.
# The lists of packages are read into FOLDER too: those of the system may be absent or old, and only root can update them.
download_packages() {
    local folder=$1 options
    shift
    options=(-qq -o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
    rm -rf "$folder"
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
    apt-get "${options[@]}" update >&2
    apt-get "${options[@]}" install --simulate --no-install-recommends "$@" > "$folder/plan"
    { printf '%s\n' "$@"; awk '$1 == "Inst" { print $2 }' "$folder/plan"; } | sort -u > "$folder/names"
    (cd "$folder" && xargs apt-get "${options[@]}" download < names >&2)
}

# write_wrapper NAME LIBRARIES: make the extracted program NAME start by its name, with LIBRARIES before the system's.
write_wrapper() {
    local name=$1 libraries=$2 path
    path=$(find "$PROGRAMS/root" \( -path "*/bin/$name" -o -path "*/sbin/$name" \) -print -quit)
    if [ -z "$path" ] || LD_LIBRARY_PATH=$libraries ldd "$path" 2>&1 | grep 'not found' >&2; then
        say "The extracted $name cannot run on this machine. Install $name, then run the script again."
        exit 1
    fi
    printf "#!/bin/sh\nLD_LIBRARY_PATH='%s'\nexport LD_LIBRARY_PATH\nexec '%s' \"\$@\"\n" "$libraries" "$path" > "$PROGRAMS/bin/$name"
    chmod +x "$PROGRAMS/bin/$name"
}

# check_code: format, lint and types.
check_code() {
    .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
}

results=()  # one line for each part that a script has run or left out
failed=0    # 1 once a part has failed

# run_part NAME COMMAND...: run one part of a script and keep its result. A part that fails does not stop the parts after it.
# bash ignores `set -e` in COMMAND, so a function chains its commands with &&.
run_part() {
    say "[$SECONDS s] $1 ..."
    if "${@:2}"; then
        results+=("passed: $1")
    else
        results+=("FAILED: $1")
        failed=1
    fi
}

# run_tests NAME ARGUMENT...: run a part of the tests in parallel, and at most three that fail again, alone.
# Some tests have real deadlines, and a machine can lose seconds to its other guests. A test that passes alone is named as
# unstable in the results: its cause is to be found, but it does not fail the part. More than three failures do.
run_tests() {
    local name=$1 cache
    shift
    cache=$(mktemp -d)
    say "[$SECONDS s] $name ..."
    if .venv/bin/python -m pytest "${parallel[@]}" --durations=20 -o cache_dir="$cache" "$@"; then
        results+=("passed: $name")
    elif list_failed "$cache" >"$cache/unstable" && [ "$(wc -l <"$cache/unstable")" -le 3 ] && run_alone "$cache" "$@"; then
        results+=("passed: $name. UNSTABLE, passed only when run alone: $(cat "$cache/unstable")")
    else
        results+=("FAILED: $name")
        failed=1
    fi
    rm -r "$cache"
}

# list_failed CACHE: print the tests that have failed, one a line. Fails if none has: then pytest has failed for another reason.
list_failed() {
    .venv/bin/python -c 'import json, sys; print("\n".join(json.load(open(sys.argv[1]))))' "$1/v/cache/lastfailed" 2>/dev/null
}

# run_alone CACHE ARGUMENT...: run the tests that have failed again, one at a time, and check the coverage of the first run.
run_alone() {
    local cache=$1 argument arguments=() has_coverage=
    shift
    for argument; do
        case $argument in
            --cov*) has_coverage=yes ;;
            *) arguments+=("$argument") ;;
        esac
    done
    say "[$SECONDS s] Again, alone ..."
    .venv/bin/python -m pytest -o cache_dir="$cache" --last-failed "${arguments[@]}" || return
    if [ -n "$has_coverage" ]; then
        .venv/bin/coverage report --rcfile=setup.cfg >/dev/null
    fi
}

# finish: print the result of each part and end the script, with status 1 if one has failed.
finish() {
    say "[$SECONDS s] Finished."
    printf '  %s\n' "${results[@]}" >&2
    exit "$failed"
}
