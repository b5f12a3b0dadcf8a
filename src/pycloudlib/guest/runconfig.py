"""User-data for a machine that has booted already: a script, or what can be run of a cloud-config.

A copy of a saved machine boots no more, so cloud-init does not look at its user-data by itself. A
script is run as it is. Of a cloud-config, the modules whose keys it has are run one by one
(`cloud-init single`), in the order in which a boot runs them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from pycloudlib.documents import parse_yaml
from pycloudlib.guest import userdata

_HEADER = "#cloud-config"

# In the order of cloud.cfg. What is missing here belongs to a boot: disks, network, host keys.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "bootcmd": ("bootcmd",),
    "write_files": ("write_files",),
    "set_hostname": ("hostname", "fqdn"),
    "ca_certs": ("ca_certs", "ca-certs"),
    "users_groups": ("users", "groups"),
    "snap": ("snap",),
    "locale": ("locale",),
    "set_passwords": ("chpasswd", "password", "ssh_pwauth"),
    "apt_configure": ("apt",),
    "ntp": ("ntp",),
    "timezone": ("timezone",),
    "runcmd": ("runcmd",),
    "package_update_upgrade_install": ("packages", "package_update", "package_upgrade"),
}
# Written by the module, and run by another one at the end of a boot.
_RUNCMD = "/var/lib/cloud/instance/scripts/runcmd"


def build_script(user_data: str | bytes) -> str:
    """Give the shell script that does in a running machine what the user-data asks for.

    Args:
        user_data: A script, or a cloud-config; it may be compressed by gzip.

    Raises:
        ValueError: It is of another kind, or has keys that only a boot can honour; names them.
        TypeError: It is not text or bytes.
    """
    if not isinstance(user_data, (str, bytes)):
        raise TypeError(f"user_data must be str or bytes, not {type(user_data).__name__}")
    try:
        content = user_data.encode() if isinstance(user_data, str) else user_data
        text = userdata.decompress(content, "user_data").decode()
    except UnicodeError as error:
        raise ValueError(f"user_data is neither a script nor a cloud-config: {error}") from error
    if text.startswith("#!"):
        return _place(text, "chmod 700 $f; $f")
    if text.partition("\n")[0].strip() == _HEADER:
        return _place(text, _run_modules(_find_modules(text)))
    first_line = text.partition("\n")[0][:60]
    raise ValueError(
        "user_data for a copy of a running machine must be a script (#!) or a cloud-config, "
        f"not one that begins with {first_line!r}: nothing boots that could take another kind"
    )


def _find_modules(text: str) -> list[str]:
    """List the modules that a cloud-config needs, in order."""
    try:
        config = parse_yaml(text) or {}
    except ValueError as error:
        raise ValueError(f"user_data is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"user_data is not a cloud-config mapping but {type(config).__name__}")
    known = {key for keys in _MODULES.values() for key in keys}
    unknown = sorted(str(key) for key in config if key not in known)
    if unknown:
        raise ValueError(
            f"user_data for a copy of a running machine has {', '.join(unknown)}, which takes a "
            f"boot; possible are {', '.join(sorted(known))}"
        )
    return [name for name, keys in _MODULES.items() if any(key in config for key in keys)]


def _run_modules(modules: list[str]) -> str:
    lines = ["status=0"]
    for module in modules:
        # A module that fails must not keep the others from running, as in a boot.
        lines.append(
            f"cloud-init --file $f single --name {module} --frequency always >>$d/log 2>&1 "
            f"|| {{ echo {module} failed >&2; tail -n 5 $d/log >&2; status=1; }}"
        )
    if "runcmd" in modules:
        # After the packages, as in a boot.
        lines.append(f"sh {_RUNCMD} || {{ echo runcmd failed >&2; status=1; }}; rm -f {_RUNCMD}")
    lines.append("exit $status")
    return "\n".join(lines)


def _place(text: str, then: str) -> str:
    """Give the script that puts a text into a file `$f` in a directory `$d`, then goes on.

    Not below /run or /tmp, where many guests let nothing be executed.
    """
    encoded = base64.b64encode(text.encode()).decode()
    return (
        "d=$(mktemp -d /var/lib/pycloudlib-user-data.XXXXXX)\n"
        "trap 'rm -rf $d' EXIT\n"
        "f=$d/user-data\n"
        f"echo {encoded} | base64 -d >$f\n"
        f"{then}\n"
    )
