"""Network interfaces that are plugged into a running guest: found, configured, told of."""

from __future__ import annotations

import shlex

from pycloudlib.documents import parse_json
from pycloudlib.result import Result

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


def configure_script(mac: str) -> str:
    """Give the script that brings a new interface up and prints its address as JSON."""
    return _CONFIGURE.format(mac=mac, file=netplan_file(mac))


def find_mac_script(address: str) -> str:
    """Give the script that prints the hardware address of the interface with an IPv4 address."""
    return (
        "interface=$(ip -4 -oneline address show to "
        f"{shlex.quote(address)} | awk '{{print $2; exit}}'); "
        '[ -n "$interface" ] && cat "/sys/class/net/$interface/address"'
    )


def forget_script(mac: str) -> str:
    """Give the script that removes an interface's configuration."""
    return f"rm -f /etc/netplan/{netplan_file(mac)}; netplan apply"


def netplan_file(mac: str) -> str:
    """Name the file of an interface's configuration."""
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
