"""Scripts that configure a running guest: what user-data asks for, network interfaces."""

from __future__ import annotations

import base64
import re
import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pycloudlib._base.documents import parse_json, parse_yaml
from pycloudlib.guest.data import userdata
from pycloudlib.guest.data.userdata import Part
from pycloudlib.result import Result

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
_DEFERRED = "write_files_deferred"  # the module for what `write_files` leaves for later
# How a cloud-config is merged with those before it.
_MERGING = ("merge_how", "merge_type")

OUTPUT_LOG = "/var/log/cloud-init-output.log"
"""The file in the guest for the output of user-data, as in a boot."""

_NAME_CHARACTERS = frozenset(f"_-.(){string.digits}{string.ascii_letters}")
# What execve(2) takes; anything else ends in "Exec format error".
_INTERPRETER = re.compile(r"#![ \t]*[^ \t\n]")
_BOOTHOOK = "#cloud-boothook"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_BASE64 = re.compile(rb"[A-Za-z0-9+/\r\n]{16,}={0,2}\s*")

_TAKES_A_BOOT: Mapping[str, str] = {
    "text/x-include-url": "what it includes is not known before the guest has fetched it",
    "text/x-include-once-url": "what it includes is not known before the guest has fetched it",
    "text/jinja2": "a template is filled in by a boot, with what the boot finds out",
    "text/part-handler": "a part handler is loaded by a boot",
    "text/cloud-config-jsonp": "JSON patches are applied by a boot",
}
# The directories of scripts, in the order in which a boot runs them; below /var/lib/cloud.
_SCRIPTS: Mapping[str, str] = {
    "text/x-shellscript-per-once": "$c/scripts/per-once",
    "text/x-shellscript-per-boot": "$c/scripts/per-boot",
    "text/x-shellscript-per-instance": "$c/scripts/per-instance",
    "text/x-shellscript": "$i/scripts",
}
_USER_SCRIPTS = _SCRIPTS["text/x-shellscript"]

# Services of systemd have this environment, and cloud-init is one. Output goes to the log, as in a
# boot; the last lines of failed programs go to stderr, too.
_PROLOGUE = """\
cd /
umask 022
c=/var/lib/cloud
i=$c/instance
d=$(mktemp -d /var/lib/pycloudlib-user-data.XXXXXX)
trap 'rm -rf $d' EXIT
[ -d $i/ ] || i=$d
[ -e $log ] || (umask 027; : >$log)
status=0
place() { mkdir -p "${1%/*}" && (umask 077; base64 -d >"$1") && chmod "$2" "$1"; }
clean() {
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    TERM=vt220 ${LANG+"LANG=$LANG"} "$@" </dev/null
}
run() {
  before=$(wc -c <$log)
  clean "$@" >>$log 2>&1 || {
    status=$?
    for last; do :; done
    echo "${last##*/} ended with exit status $status" >&2
    tail -c +$((before + 1)) $log | tail -n 5 >&2
  }
}
"""
# cloud-init writes to that log itself, and reads the cloud-config from its standard place: the
# option for another one has moved between versions. Its pickled datasource has the identity of the
# machine that was saved.
_PROLOGUE_OF_MODULES = """\
module() {
  clean cloud-init single --name $1 --frequency always >$d/out 2>&1 || {
    status=1; echo "$1 failed" >&2; tail -n 5 $d/out >&2
  }
}
clean python3 -c '
import pickle, sys
try:
    with open(sys.argv[1], "rb") as file:
        source = pickle.load(file)
    with open(sys.argv[2], encoding="utf-8") as file:
        name = file.read().strip()
    if source.metadata["instance-id"] != name:
        source.metadata["instance-id"] = name
        with open(sys.argv[1], "wb") as file:
            pickle.dump(source, file)
except OSError:
    pass
' $i/obj.pkl $c/data/instance-id
"""

_CONFIGURE = """
set -e
mac={mac}
tries=0
while :; do
  for file in /sys/class/net/*/address; do
    [ "$(cat "$file")" = "$mac" ] && interface=$(basename "$(dirname "$file")") && break 2
  done
  tries=$((tries + 1))
  [ $tries -lt 150 ] || {{ echo "no interface with address $mac appeared" >&2; exit 1; }}
  sleep 0.2
done
umask 077
cat >/etc/netplan/{file} <<END
network:
  version: 2
  ethernets:
    $interface:
      match: {{macaddress: "$mac"}}
      dhcp4: true
      dhcp4-overrides: {{use-routes: false, use-dns: false}}
END
netplan apply
tries=0
until ip -4 -json address show dev "$interface" scope global | grep -q '"local"'; do
  tries=$((tries + 1))
  [ $tries -lt 300 ] || {{ echo "$interface got no address by DHCP" >&2; exit 1; }}
  sleep 0.2
done
ip -4 -json address show dev "$interface" scope global
"""
"""Waits for the interface with an address, sets it up by netplan, waits for DHCP.

Routes and name servers stay those of the first interface, by which the guest reaches the host.
"""


@dataclass(slots=True)
class _Plan:
    """The steps of a user-data.

    Attributes:
        boothooks: Programs that are run first, by name.
        config: All cloud-configs, merged; None if there is none.
        scripts: Programs that are run last, by their directory, by name.
    """

    boothooks: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    scripts: dict[str, dict[str, str]] = field(default_factory=dict)


def build_script(user_data: str | bytes) -> str:
    """Return the shell script that does in a running machine what the user-data asks for.

    Args:
        user_data: For cloud-init, in any of its forms.

    Returns:
        The script, for root; empty when there is nothing to do.

    Raises:
        ValueError: cloud-init would not accept it, or only in a boot; gives the reason.
        TypeError: It is not text or bytes.
    """
    if not isinstance(user_data, (str, bytes)):
        raise TypeError(f"user_data must be str or bytes, not {type(user_data).__name__}")
    try:
        content = user_data.encode() if isinstance(user_data, str) else user_data
    except UnicodeError as error:
        raise ValueError(f"user_data cannot be written as UTF-8: {error}") from error
    plan = _Plan()
    parts = userdata.parts(content, "user_data")
    for part in parts:
        try:
            _add(plan, part)
        except ValueError as error:
            what = "user_data" if len(parts) == 1 else f"{part.name} of user_data"
            raise ValueError(
                f"{what} cannot be run in a copy of a running machine: {error}"
            ) from error
    return _write(plan)


def _add(plan: _Plan, part: Part) -> None:
    """Add a part to the plan.

    Raises:
        ValueError: It cannot be done; gives the reason.
    """
    if part.kind in _TAKES_A_BOOT:
        raise ValueError(f"it is {part.kind}, which takes a boot: {_TAKES_A_BOOT[part.kind]}")
    if part.kind == "text/cloud-config":
        plan.config = _merge(plan.config, part)
    elif part.kind in _SCRIPTS:
        scripts = plan.scripts.setdefault(_SCRIPTS[part.kind], {})
        scripts[_file_name(part)] = _executable(_with_unix_lines(_text(part)))
    elif part.kind == "text/cloud-boothook":
        text = _with_unix_lines(_text(part)).removeprefix(_BOOTHOOK).lstrip()
        plan.boothooks[_file_name(part)] = _executable(text)
    elif part.content.strip():
        raise ValueError(_describe_unknown(part))


def _text(part: Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8, which is all that cloud-init reads: {error}") from error


def _with_unix_lines(text: str) -> str:
    """Convert line ends if the first one is Windows', as cloud-init does (util.dos2unix)."""
    return text.replace("\r\n", "\n") if text.partition("\n")[0].endswith("\r") else text


def _executable(text: str) -> str:
    if not _INTERPRETER.match(text):
        raise ValueError(
            "a boot would not execute it (Exec format error): a script has to begin with #! and an "
            f"interpreter, without anything before it, not with {text[:40]!r}"
        )
    return text


def _file_name(part: Part) -> str:
    """Return the name under which cloud-init keeps a part (util.clean_filename)."""
    kept = "".join(char for char in part.name.replace("/", "_") if char in _NAME_CHARACTERS)
    if kept in ("", ".", ".."):
        raise ValueError(f"of its file name, {part.name!r}, cloud-init leaves {kept!r}")
    return kept


def _describe_unknown(part: Part) -> str:
    """Describe what is wrong with a part that cloud-init would ignore."""
    content = part.content
    hint = ""
    if content.startswith(_BYTE_ORDER_MARKS):
        hint = "; that is a byte order mark, which no editor shows: save it without"
    elif _BASE64.fullmatch(content):
        hint = "; it looks like base64, which is for other clouds to decode: give what it encodes"
    elif content.lstrip().lower().startswith(b"# cloud-config"):
        hint = "; there is no blank in #cloud-config"
    if part.kind == userdata.UNKNOWN:
        what = f"nothing that begins with {content[:40]!r}"
    else:
        what = f"no part of type {part.kind}"
    return (
        f"cloud-init takes {what}; possible are scripts (#!), #cloud-config and #cloud-boothook"
        f"{hint}"
    )


def _merge(before: dict[str, Any] | None, part: Part) -> dict[str, Any]:
    """Merge a cloud-config with those before it: its values replace those of the same key.

    Raises:
        ValueError: It is no cloud-config, or is to be merged in another way.
    """
    text = _text(part)
    try:
        config = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"it is not valid YAML: {error}") from error
    if config is None:
        return before or {}
    if not isinstance(config, dict):
        raise ValueError(f"it is not a cloud-config mapping but {type(config).__name__}")
    merging = [config.pop(key, None) for key in _MERGING]
    if before and (part.merging or any(merging)):
        raise ValueError(
            "it says how it is to be merged with the cloud-config before it (merge_how), which "
            "takes a boot; without that, it replaces the keys that both have"
        )
    known = {key for keys in _MODULES.values() for key in keys}
    unknown = sorted(str(key) for key in config if key not in known)
    if unknown:
        raise ValueError(
            f"it has {', '.join(unknown)}, which takes a boot; possible are "
            f"{', '.join(sorted(known))}"
        )
    return {**(before or {}), **config}


def _write(plan: _Plan) -> str:
    """Return the plan as a script."""
    config = plan.config or {}
    modules = [name for name, keys in _MODULES.items() if any(key in config for key in keys)]
    steps: list[str] = []
    for name, text in plan.boothooks.items():
        program = f"$i/boothooks/{shlex.quote(name)}"
        steps += [_place(text, program), f'run INSTANCE_ID="$(cat $c/data/instance-id)" {program}']
    for directory, scripts in plan.scripts.items():
        for name, text in scripts.items():
            steps.append(_place(text, f"{directory}/{shlex.quote(name)}"))
    if modules:
        steps += [_place(_dump(config), "$i/cloud-config.txt", mode=600), _PROLOGUE_OF_MODULES]
        steps.append(f"rm -f {_USER_SCRIPTS}/runcmd")  # of the saved machine's own user-data
        steps += [f"module {name}" for name in modules]
        if _has_deferred(config):
            steps.append(f"module {_DEFERRED}")
    for directory in _SCRIPTS.values():
        names = {*plan.scripts.get(directory, ())}
        if directory == _USER_SCRIPTS and "runcmd" in modules:
            names.add("runcmd")  # written by the module
        programs = [f"{directory}/{shlex.quote(name)}" for name in sorted(names)]
        # A module that fails leaves none.
        steps += [f"[ ! -e {program} ] || run {program}" for program in programs]
    return "\n".join([f"log={OUTPUT_LOG}", _PROLOGUE, *steps, "exit $status\n"]) if steps else ""


def _has_deferred(config: Mapping[str, Any]) -> bool:
    files = config.get("write_files")
    return isinstance(files, list) and any(
        isinstance(file, dict) and file.get("defer") for file in files
    )


def _dump(config: Mapping[str, Any]) -> str:
    import yaml  # noqa: PLC0415 - heavy

    try:
        text: str = yaml.safe_dump(dict(config), sort_keys=False)
    except RecursionError:
        raise ValueError("user_data is nested too deeply") from None
    return f"#cloud-config\n{text}"


def _place(text: str, path: str, mode: int = 700) -> str:
    """Return the command that writes a file, byte for byte."""
    encoded = base64.encodebytes(text.encode()).decode()
    return f"place {path} {mode} <<'end'\n{encoded}end"


def configure_script(mac: str) -> str:
    """Return the script that brings a new interface up and prints its address as JSON."""
    return _CONFIGURE.format(mac=mac, file=netplan_file(mac))


def find_mac_script(address: str) -> str:
    """Return the script that prints the hardware address of the interface with an IPv4 address."""
    return (
        "interface=$(ip -4 -oneline address show to "
        f"{shlex.quote(address)} | awk '{{print $2; exit}}'); "
        '[ -n "$interface" ] && cat "/sys/class/net/$interface/address"'
    )


def forget_script(mac: str) -> str:
    """Return the script that removes an interface's configuration."""
    return f"rm -f /etc/netplan/{netplan_file(mac)}; netplan apply"


def netplan_file(mac: str) -> str:
    """Return the name of an interface's configuration file."""
    return f"60-hotplug-{mac.replace(':', '')}.yaml"


def parse_address(result: Result) -> str:
    """Read the IPv4 address that `configure_script` printed.

    Raises:
        ValueError: There is none.
    """
    try:
        interfaces = parse_json(result.stdout)
        return str(interfaces[0]["addr_info"][0]["local"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"no address in {result.stdout!r}: {result.stderr}") from error
