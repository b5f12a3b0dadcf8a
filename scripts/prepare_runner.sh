#!/usr/bin/env bash
# Let the user of one of GitHub's Ubuntu runners use KVM, and make user namespaces, in which images
# are built without root. For machines that are thrown away: it changes what every user may do.
set -euo pipefail

[ "${GITHUB_ACTIONS:-}" = true ] || {
    echo "prepare_runner: this is for GitHub's runners; elsewhere: sudo usermod -aG kvm YOU" >&2
    exit 1
}

echo 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' |
    sudo tee /etc/udev/rules.d/99-kvm4all.rules
sudo udevadm control --reload-rules
sudo udevadm trigger --name-match=kvm --settle
ls -l /dev/kvm

# From Ubuntu 23.10 on AppArmor keeps users without a profile from them.
restriction=/proc/sys/kernel/apparmor_restrict_unprivileged_userns
if [ -e "$restriction" ]; then echo 0 | sudo tee "$restriction"; fi
