"""The seeds of the guests that tests boot: one for each kind of user-data."""

from __future__ import annotations

import enum
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

from pycloudlib.key import generate_ed25519


@enum.unique
class Kind(enum.Enum):
    """Kinds of user-data; the last is a script again, in a newer distribution."""

    CLOUD_CONFIG = "cloud-config"
    SCRIPT = "script"
    MULTIPART = "multipart"
    ARCHIVE = "archive"
    JINJA = "jinja"
    GZIP = "gzip"
    NONE = "none"
    TRIXIE = "trixie"


@dataclass(frozen=True, slots=True)
class TestSeed:
    """What a machine is given.

    Attributes:
        user_data: Its user-data.
        proof: A command that shows that the user-data took effect, and what it prints.
        meta_data: Its meta-data.
        vendor_data: Its vendor-data.
        kernel_cmdline: Boots its kernel directly.
    """

    __test__ = False

    user_data: str | bytes | None
    proof: tuple[str, str]
    meta_data: Mapping[str, Any] | None = None
    vendor_data: str | None = None
    kernel_cmdline: str = ""


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
ARCHIVE = (
    """\
#cloud-config-archive
- type: text/cloud-config
  content: |
    ssh_keys:
      ed25519_private: |
"""
    + "".join(f"        {line}\n" for line in OWN_HOST_KEY[0].splitlines())
    + f"""\
      ed25519_public: {OWN_HOST_KEY[1]}
- type: text/x-shellscript
  content: |
    #!/bin/sh
    echo archive >/var/tmp/proof
"""
)


def make_multipart() -> str:
    """Make a MIME document of a cloud-config and a script."""
    document = MIMEMultipart()
    config = "#cloud-config\nwrite_files: [{path: /var/tmp/config, content: multi}]\n"
    document.attach(MIMEText(config, "cloud-config"))
    script = "#!/bin/sh\necho $(cat /var/tmp/config)part >/var/tmp/proof\n"
    document.attach(MIMEText(script, "x-shellscript"))
    return document.as_string()


_CAT = "cat /var/tmp/proof"

SEEDS = {
    Kind.CLOUD_CONFIG: TestSeed(
        CLOUD_CONFIG,
        (_CAT, "cloud-config"),
        meta_data={"local-hostname": "callers-name", "public-keys": [CALLERS_KEY]},
        vendor_data="#!/bin/sh\necho vendor >/var/tmp/vendor\n",
    ),
    Kind.SCRIPT: TestSeed(SCRIPT, (_CAT, "script")),
    Kind.MULTIPART: TestSeed(make_multipart(), (_CAT, "multipart")),
    Kind.ARCHIVE: TestSeed(ARCHIVE, (_CAT, "archive")),
    Kind.JINJA: TestSeed(JINJA, (f"{_CAT} | sed s/$(hostname)/HOSTNAME/", "jinja HOSTNAME")),
    Kind.GZIP: TestSeed(
        gzip.compress(b"#!/bin/sh\necho gzip >/var/tmp/proof\n"),
        (_CAT, "gzip"),
        kernel_cmdline="ds=nocloud;h=myhost;i=myid quiet",
    ),
    Kind.TRIXIE: TestSeed("#!/bin/sh\necho trixie >/var/tmp/proof\n", (_CAT, "trixie")),
    Kind.NONE: TestSeed(None, ("test -e /var/tmp/proof || echo nothing", "nothing")),
}
