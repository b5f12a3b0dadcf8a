"""The seeds of the guests that tests boot: one for each kind of user-data."""

from __future__ import annotations

import dataclasses
import enum
import gzip
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pycloudlib.images.recipe import RELEASES
from pycloudlib.key import generate_ed25519
from tests.unit import userdataforms
from tests.unit.userdataforms import IN_ORDER, PARTS, RECORD, mime, text

STANDARD = "bookworm"
RELEASE = os.environ.get("PYCLOUDLIB_TEST_RELEASE") or STANDARD
"""The release whose image takes the place of the standard one; `make test RELEASE=noble`."""

SIZE = "c1m512" if RELEASE in RELEASES else "c1m1024"
"""The size of machines: the images that are built here need little."""


@enum.unique
class Kind(enum.Enum):
    """Kinds of user-data, and of boots: the same cloud-config twice."""

    CLOUD_CONFIG = "cloud-config"
    FAST = "cloud-config, fast"
    SCRIPT = "script"
    MULTIPART = "multipart"
    ARCHIVE = "archive"
    JINJA = "jinja"
    GZIP = "gzip"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class TestSeed:
    """What a machine is given.

    Attributes:
        user_data: Its user-data.
        proof: A command that shows that the user-data took effect, and what it prints.
        meta_data: Its meta-data.
        vendor_data: Its vendor-data.
        network_config: Its network configuration.
        kernel_cmdline: Boots its kernel directly.
        release: The release of its image; see `get_image`.
        fast_boot: Whether its first boot begins at cloud-init.
    """

    __test__ = False

    user_data: str | bytes | None
    proof: tuple[str, str]
    meta_data: Mapping[str, Any] | None = None
    vendor_data: str | None = None
    network_config: Mapping[str, Any] | None = None
    kernel_cmdline: str = ""
    release: str = STANDARD
    fast_boot: bool = True


LARGE = 1 << 20
"""Bytes of user-data that are many."""

COMPARED = (Kind.CLOUD_CONFIG, Kind.FAST)
"""One seed, by an ordinary boot and by a fast one."""

THOROUGH = (Kind.ARCHIVE, Kind.JINJA)
"""Those of the thorough tests alone. An archive is in the ordinary run, too: compressed."""

EVERY_TIME = tuple(kind for kind in Kind if kind not in (*THOROUGH, Kind.NONE))
"""The machines that an ordinary run boots together. The one without user-data is not among them:
it is booted where copies are made of it."""

CALLERS_KEY = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP//////////////////////////////////////// caller"
)
OWN_HOST_KEY = generate_ed25519("the caller's host key")

CLOUD_CONFIG = """\
#cloud-config
# Bytes that a careless hand would change: "quotes", trailing blanks,   \ttabs, ünïcödé
write_files:
  - path: /var/tmp/proof
    content: cloud-config
"""
# It fails, which is what people test: waiting for it does not raise, but tells.
SCRIPT = """\
#!/bin/sh
echo script >/var/tmp/proof
exit 3
"""
JINJA = """\
## template: jinja
#cloud-config
write_files:
  - path: /var/tmp/proof
    content: jinja {{ v1.local_hostname }}
"""


def make_archive(proof: str) -> str:
    """Make an archive of a host key and a script."""
    key = "".join(f"        {line}\n" for line in OWN_HOST_KEY[0].splitlines())
    return f"""\
#cloud-config-archive
- type: text/cloud-config
  content: |
    ssh_keys:
      ed25519_private: |
{key}      ed25519_public: {OWN_HOST_KEY[1]}
- type: text/x-shellscript
  content: |
    #!/bin/sh
    echo {proof} >/var/tmp/proof
"""


_EMPTY = text("", "plain")


def make_multipart() -> str:
    """Make a MIME document of parts of all kinds, among them a large one."""
    config = "#cloud-config\nssh_genkeytypes: [ecdsa]\n"
    large = userdataforms.script("part-012") + f"{'#' * 63}\n" * (LARGE // 64)
    # A first boot with a boothook begins at its beginning; one is tried elsewhere. The parts'
    # numbers, of which files get their names, stay.
    parts = (part if part.get_content_subtype() != "cloud-boothook" else _EMPTY for part in PARTS)
    return mime(*parts, text(config, "cloud-config"), text(large, "x-shellscript")).decode()


# With `IID` for the instance's id.
SHOW_RECORD = f"sed s/$(cat /var/lib/cloud/data/instance-id)/IID/ {RECORD}"
_IN_ORDER = "\n".join(line for line in IN_ORDER if "hook" not in line).replace(
    "part-010", "part-010\npart-012"
)

_CAT = "cat /var/tmp/proof"

# One that is told from the one that cloud-init would make by itself.
NETWORK_NAME = "given"
NETWORK = {
    "version": 2,
    "ethernets": {
        NETWORK_NAME: {"match": {"name": "en*"}, "dhcp4": True, "dhcp-identifier": "mac"}
    },
}

_CLOUD_CONFIG = TestSeed(
    CLOUD_CONFIG,
    (_CAT, "cloud-config"),
    meta_data={"local-hostname": "callers-name", "public-keys": [CALLERS_KEY]},
    vendor_data="#!/bin/sh\necho vendor >/var/tmp/vendor\n",
    fast_boot=False,
)

SEEDS = {
    Kind.CLOUD_CONFIG: _CLOUD_CONFIG,
    Kind.FAST: dataclasses.replace(_CLOUD_CONFIG, fast_boot=True),
    Kind.SCRIPT: TestSeed(SCRIPT, (_CAT, "script"), network_config=NETWORK),
    Kind.MULTIPART: TestSeed(make_multipart(), (SHOW_RECORD, _IN_ORDER)),
    Kind.ARCHIVE: TestSeed(make_archive("archive"), (_CAT, "archive")),
    Kind.JINJA: TestSeed(JINJA, (f"{_CAT} | sed s/$(hostname)/HOSTNAME/", "jinja HOSTNAME")),
    Kind.GZIP: TestSeed(
        gzip.compress(make_archive("gzip").encode()),
        (_CAT, "gzip"),
        kernel_cmdline="ds=nocloud;h=myhost;i=myid quiet",
        release="trixie",
        fast_boot=False,
    ),
    Kind.NONE: TestSeed(None, ("test -e /var/tmp/proof || echo nothing", "nothing")),
}
