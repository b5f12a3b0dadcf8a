#!/usr/bin/env bash
# Make this checkout ready to use: the host's programs, and a virtual environment with the package.
#
# What is there is left alone: when nothing is missing, this ends at once and says nothing.
# Environment: PYTHON, the interpreter of the virtual environment (default: python3);
# EXTRA_REQUIREMENT, one more program to have, as in the list below.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
venv=$root/.venv
# Two lines that tell what the virtual environment was made of; "unfinished" while it is made.
state_file=$venv/setup-state
log=$root/build/setup.log

# Administrators' programs: an ordinary user's PATH on Debian leaves them out.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

# What has to be there (a program, or a file by its absolute path), the package it comes with,
# and what it is for.
requirements=(
    "qemu-system-x86_64|qemu-system-x86|runs the virtual machines"
    "qemu-img|qemu-utils|makes and checks their disks"
    "gpgv|gpgv|checks the signatures of downloaded images"
    "ssh|openssh-client|keeps connections between commands of the command line"
    "gpg|gpg|signs what the tests download"
    "gpg-agent|gpg-agent|holds the key they sign with"
    "mmdebstrap|mmdebstrap|builds images: installs their packages"
    "newuidmap|uidmap|builds images without root"
    "mke2fs|e2fsprogs|builds images: the root file system"
    "mkfs.vfat|dosfstools|builds images: the EFI partition's file system"
    "sfdisk|fdisk|builds images: the partition table"
    "grub-mkimage|grub-common|builds images: the boot loader"
    "/usr/lib/grub/i386-pc|grub-pc-bin|builds images: the boot loader's BIOS part"
)
# What one target alone needs, in the same form.
if [ -n "${EXTRA_REQUIREMENT:-}" ]; then requirements+=("$EXTRA_REQUIREMENT"); fi

say() { printf '%s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_there() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# --- Steps: one line each, their output in the log ------------------------------------------------

ticker=

stop_ticker() {
    [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true
    ticker=
}
trap stop_ticker EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# On a terminal: the seconds go up while a step takes its time. The command itself runs in the
# foreground, where Ctrl-C reaches it.
start_ticker() {
    [ -t 1 ] || return 0
    (
        while sleep 1 && kill -0 $$ 2>/dev/null; do
            printf '\r  %s ... %d s ' "$1" "$SECONDS"
        done
    ) 9>&- &
    ticker=$!
}

step() {
    local name=$1 status=0
    shift
    SECONDS=0
    printf '  %s ... ' "$name"
    start_ticker "$name"
    printf '\n== %s\n++ %s\n' "$name" "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null 9>&- || status=$?
    stop_ticker
    if [ -t 1 ]; then printf '\r  %s ... ' "$name"; fi
    if [ "$status" = 0 ]; then
        say "done (${SECONDS} s)"
    else
        say "failed"
    fi
    return "$status"
}

show_log_and_fail() {
    printf '\n' >&2
    tail -n 25 "$log" | sed 's/^/  | /' >&2
    fail "$1 (all of the output: $log)"
}

# --- The host's programs --------------------------------------------------------------------------

# `ensurepip` is what Debian and Ubuntu leave out of python3 and put into python3-venv.
python_has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

venv_package() {
    # An interpreter other than the distribution's own python3 has a package of its own.
    if [ "$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')" = \
        "$(readlink -f /usr/bin/python3)" ]; then
        say python3-venv
    else
        "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    fi
}

check_python() {
    command -v "$python" >/dev/null ||
        fail "Python 3.10 or newer is needed, and there is no '$python'." \
            "Install it, or name it: make setup PYTHON=/path/to/python3.12"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed, and '$python' is $("$python" --version 2>&1)." \
            "Name a newer one: make setup PYTHON=python3.12"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 -o Acquire::http::Timeout=20 \
        -o Acquire::https::Timeout=20 "$@"
}

install_missing() {
    local requirement need package reason
    local -a packages=() reasons=()
    for requirement in "${requirements[@]}"; do
        IFS='|' read -r need package reason <<<"$requirement"
        if ! is_there "$need"; then
            packages+=("$package")
            reasons+=("$reason")
        fi
    done
    if [ ! -x "$venv/bin/python" ] && ! python_has_venv; then
        packages+=("$(venv_package)")
        reasons+=("makes the virtual environment")
    fi
    [ "${#packages[@]}" -gt 0 ] || return 0

    say "These packages of the system are missing:"
    local i
    for i in "${!packages[@]}"; do
        printf '  %-24s %s\n' "${packages[i]}" "${reasons[i]}"
    done
    command -v apt-get >/dev/null ||
        fail "There is no apt-get here to install them (this is made for Debian and Ubuntu)." \
            "Install what gives these programs and files, and run this again."
    local by_hand="apt-get install --no-install-recommends ${packages[*]}"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null ||
            fail "Installing them needs root, and there is no sudo. As root, run: $by_hand"
        # Now, so that it may ask for a password before a step's output goes to the log.
        sudo true || fail "Installing them needs root. As root, run: $by_hand"
    fi
    say "Getting them with apt-get:"
    # A repository of somebody else's may be broken; whether that matters shows at the installation.
    step "refreshing the package lists" apt_get update ||
        say "  (a package repository of this machine cannot be read; going on without it)"
    step "installing them" apt_get install --no-install-recommends "${packages[@]}" ||
        show_log_and_fail "The packages could not be installed"
}

# --- The virtual environment ----------------------------------------------------------------------

# Where it is and what interprets it: a virtual environment cannot be moved, nor follow the
# system's python3 to another version.
venv_identity() { say "$root $(readlink -f "$venv/bin/python" || true)"; }

venv_content() { cksum <pyproject.toml; }

venv_works() { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local state="" why
    if [ -e "$state_file" ]; then state=$(<"$state_file"); fi
    if [ -x "$venv/bin/python" ] && [ "$state" = "$(venv_identity)"$'\n'"$(venv_content)" ]; then
        return 0
    fi
    if [ ! -e "$venv" ]; then
        why="Making a virtual environment in .venv:"
    elif [ "$state" = unfinished ] || ! venv_works; then
        why="Making the virtual environment in .venv anew (the one there is unfinished or broken):"
    elif [ -n "$state" ] && [ "${state%%$'\n'*}" != "$(venv_identity)" ]; then
        why="Making the virtual environment in .venv anew (the one there was for another place or Python):"
    else
        why=
        say "Bringing the virtual environment in .venv up to date:"
    fi
    if [ -n "$why" ]; then
        say "$why"
        rm -rf "$venv"
        mkdir "$venv"
        say unfinished >"$state_file"
        step "making it with $("$python" --version 2>&1)" "$python" -m venv "$venv" ||
            show_log_and_fail "The virtual environment could not be made"
    fi
    say unfinished >"$state_file"
    # pip before 25.1, which Debian 12 and Ubuntu 22.04 have, knows no dependency groups.
    step "updating pip in it" "$venv/bin/python" -m pip install "pip>=25.1" ||
        show_log_and_fail "pip could not be updated"
    step "installing the package and what it is developed with" \
        "$venv/bin/python" -m pip install --editable . --group dev ||
        show_log_and_fail "The package could not be installed into the virtual environment"
    { venv_identity && venv_content; } >"$state_file"
}

mkdir -p "$(dirname "$log")"
# Two at a time would be in each other's way.
exec 9>"$log.lock"
flock 9
: >"$log"
check_python
install_missing
make_venv
