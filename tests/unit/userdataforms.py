"""Forms of user-data: what a boot does with each, and what a copy of a running machine does.

What a boot does was seen by letting the code of cloud-init 22.4 (bookworm) and 25.1 (trixie) handle
each of them; both do the same. The tests of guests look at some of it in a boot again. The table in
`docs/how-to/save-a-running-machine.md` has a row for each.
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass
from email.message import Message
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

RECORD = "/var/tmp/record"
"""The file in a guest to which everything below adds a line when it is run."""


@dataclass(frozen=True, slots=True)
class Form:
    """A form of user-data.

    Attributes:
        name: What it is.
        row: How the row of the documents' table begins that tells of it.
        document: User-data of that form.
        boot: The lines that are recorded in a boot; empty when cloud-init passes over it or fails.
        refused: What a copy says when it does not do the same as a boot.
    """

    name: str
    row: str
    document: str | bytes
    boot: tuple[str, ...]
    refused: str = ""


def script(word: str = "script") -> str:
    return f"#!/bin/sh\necho {word} >>{RECORD}\n"


def config(*words: str, more: str = "") -> str:
    """Make a cloud-config that records words: by `bootcmd` the first, by `runcmd` the others."""
    first, *others = [f"echo {word} >>{RECORD}" for word in words]
    return f"#cloud-config\nbootcmd: [{first}]\nruncmd: {others}\n{more}"


def mime(*parts: Message) -> bytes:
    document = MIMEMultipart()
    for part in parts:
        document.attach(part)
    return document.as_bytes()


def text(content: str, kind: str, name: str = "", **headers: str) -> MIMEText:
    part = MIMEText(content, kind)
    if name:
        part.add_header("Content-Disposition", "attachment", filename=name)
    for header, value in headers.items():
        part[header.replace("_", "-")] = value
    return part


HOOK = f"#cloud-boothook\n{script('hook $INSTANCE_ID')}"
PARTS = (
    text(script("second"), "x-shellscript", "b.sh"),
    text(script("first"), "x-shellscript", "../a.sh"),
    text(config("bootcmd", "never"), "cloud-config"),
    text(config("bootcmd", "runcmd"), "cloud-config"),
    text(HOOK, "cloud-boothook"),
    text(script("per-instance"), "x-shellscript-per-instance", "i.sh"),
    text(script("per-boot"), "x-shellscript-per-boot", "b.sh"),
    text(script("per-once"), "x-shellscript-per-once", "o.sh"),
    text("", "plain"),
    MIMEApplication(gzip.compress(script("part-010").encode(), mtime=0), "gzip"),
)
EVERYTHING = mime(*PARTS)
IN_ORDER = (
    "hook IID",
    "bootcmd",
    "per-once",
    "per-boot",
    "per-instance",
    "first",
    "second",
    "part-010",
    "runcmd",
)
ARCHIVE = f"""\
#cloud-config-archive
- type: text/x-shellscript
  filename: z.sh
  content: |
    #!/bin/sh
    echo last >>{RECORD}
- |
  #!/bin/sh
  echo part-002 >>{RECORD}
- "#cloud-config\\nbootcmd: [echo bootcmd >>{RECORD}]"
- content: !!binary {base64.b64encode(script("binary").encode()).decode()}
- 7
"""
_MARKED = "byte order mark"
_BASE64 = "looks like base64"

FORMS = (
    Form("script", "script (", script(), ("script",)),
    Form("script in bytes", "script (", script().encode(), ("script",)),
    Form(
        "Python", "script (", f"#!/usr/bin/python3\nopen('{RECORD}','a').write('py\\n')\n", ("py",)
    ),
    Form("interpreter with arguments", "script (", f"#!/bin/sh -eu\nfalse\necho >>{RECORD}\n", ()),
    Form("blank before the interpreter", "script (", script().replace("#!", "#! "), ("script",)),
    Form("script that is not ASCII", "script (", f"{script()}# grüße 🙂\n", ("script",)),
    Form("CRLF", "lines that end as on Windows", script().replace("\n", "\r\n"), ("script",)),
    Form(
        "LF, then CRLF", "lines that end as on Windows", f"#!/bin/sh\necho x >>{RECORD}\r\n", (), ""
    ),
    Form("cloud-config", "cloud-config |", config("a", "b"), ("a", "b")),
    Form("in capitals", "cloud-config |", config("a").replace("config", "CONFIG"), ("a",)),
    Form("with a comment", "cloud-config |", config("a").replace("\n", " # x\n", 1), ("a",)),
    Form("after blank lines", "cloud-config |", f"\n \n{config('a')}", ("a",)),
    Form(
        "cloud-config with CRLF",
        "lines that end as on Windows",
        config("a", "b").replace("\n", "\r\n"),
        ("a", "b"),
    ),
    Form("empty cloud-config", "nothing", "#cloud-config\n", ()),
    Form("alone, with merge_how", "cloud-config |", config("a", more="merge_how: x()\n"), ("a",)),
    Form("boothook", "boothook", HOOK, ("hook IID",)),
    Form(
        "boothook with CRLF",
        "lines that end as on Windows",
        HOOK.replace("\n", "\r\n"),
        ("hook IID",),
    ),
    Form("gzip", "gzip", gzip.compress(script().encode(), mtime=0), ("script",)),
    Form("MIME", "MIME", EVERYTHING, IN_ORDER),
    Form("MIME, compressed", "MIME", gzip.compress(EVERYTHING, mtime=0), IN_ORDER),
    Form("MIME with CRLF", "MIME", EVERYTHING.replace(b"\n", b"\r\n"), IN_ORDER),
    Form(
        "parts of parts",
        "MIME",
        mime(MIMEMultipart(_subparts=[text(script(), "plain")])),
        ("script",),
    ),
    Form("one name twice", "MIME", mime(*[text(script(w), "plain", "x") for w in "ab"]), ("b",)),
    Form("archive", "archive", ARCHIVE, ("bootcmd", "part-002", "binary", "last")),
    Form(
        "archive of what is text",
        "cloud-config that is no YAML",
        ARCHIVE.replace("!!binary", ""),
        (),
        "not a cloud-config",
    ),
    Form(
        "archive in MIME",
        "archive",
        mime(text(f"#cloud-config-archive\n- {script()!r}\n".replace("'", '"'), "plain")),
        ("script",),
    ),
    Form("empty", "nothing", "", ()),
    Form("white space", "nothing", " \n\t\r\n", ()),
    Form("mark", "byte order mark", b"\xef\xbb\xbf" + script().encode(), (), _MARKED),
    Form("mark before a cloud-config", "byte order mark", "\ufeff" + config("a"), (), _MARKED),
    Form("UTF-16", "byte order mark", script().encode("utf-16"), (), _MARKED),
    Form("Latin-1", "not UTF-8", script().encode() + b"# gr\xfc\n", (), "not UTF-8"),
    Form("Latin-1 config", "not UTF-8", config("gr\xfc").encode("latin-1"), (), "not UTF-8"),
    Form("half a character", "not UTF-8", script("\udcff"), (), "cannot be written as UTF-8"),
    Form("ELF", "anything else", b"\x7fELF\2\1\1\0\xff", (), r"begins with b'\\x7fELF"),
    Form("base64", "base64", base64.b64encode(script().encode()), (), _BASE64),
    Form(
        "base64 of gzip",
        "base64",
        base64.encodebytes(gzip.compress(b"#!/bin/sh", mtime=0)),
        (),
        _BASE64,
    ),
    Form(
        "gzip twice",
        "anything else",
        gzip.compress(gzip.compress(b"#!/bin/sh", mtime=0), mtime=0),
        (),
        "takes nothing that begins",
    ),
    Form(
        "damaged gzip",
        "anything else",
        gzip.compress(b"#!/bin/sh", mtime=0)[:-5],
        (),
        "damaged gzip",
    ),
    Form("JSON", "anything else", '{"runcmd": []}', (), "takes nothing that begins"),
    Form("blank in #cloud-config", "anything else", "# cloud-config\na: 1\n", (), "no blank"),
    Form("text", "anything else", "hello", (), "takes nothing that begins"),
    Form(
        "other type",
        "anything else",
        mime(text("x", "html")),
        (),
        "takes no part of type text/html",
    ),
    Form("binary part", "anything else", mime(MIMEApplication(b"\x7fELF\xff")), (), "octet-stream"),
    Form(
        "script after a blank line",
        "script that does not begin",
        f"\n{script()}",
        (),
        "Exec format error",
    ),
    Form("no interpreter", "script that does not begin", "#!\necho\n", (), "Exec format error"),
    Form(
        "script without #!",
        "script that does not begin",
        mime(text("echo", "x-shellscript")),
        (),
        "Exec format",
    ),
    Form(
        "hook without #!",
        "script that does not begin",
        "#cloud-boothook\necho\n",
        (),
        "Exec format error",
    ),
    Form(
        "tab",
        "cloud-config that is no YAML",
        "#cloud-config\nbootcmd:\n\t- x\n",
        (),
        "not valid YAML",
    ),
    Form(
        "list",
        "cloud-config that is no YAML",
        "#cloud-config\n- a\n",
        (),
        "not a cloud-config mapping",
    ),
    Form(
        "key of a boot",
        "cloud-config with other keys",
        "#cloud-config\ngrowpart: {}\n",
        (),
        "growpart, which takes a boot",
    ),
    Form(
        "jinja",
        "template",
        f"## template: jinja\n{config('x')}",
        ("x",),
        "text/jinja2, which takes",
    ),
    Form("include", "`#include`", "#include\nhttp://x/\n", (), "x-include-url, which takes a boot"),
    Form("include once", "`#include`", "#include-once\nhttp://x/\n", (), "which takes a boot"),
    Form(
        "part handler", "`#part-handler`", "#part-handler\n", (), "part-handler, which takes a boot"
    ),
    Form("JSON patch", "JSON patch", "#cloud-config-jsonp\n[]\n", (), "jsonp, which takes a boot"),
    Form(
        "merge_how",
        "cloud-config after another",
        mime(
            text(config("a"), "cloud-config"),
            text(config("b", more="merge_how: 'list(append)+dict()+str()'\n"), "cloud-config"),
        ),
        ("a", "b"),
        "merge_how",
    ),
    Form(
        "Merge-Type",
        "cloud-config after another",
        mime(
            text(config("a"), "cloud-config"),
            text(config("b"), "cloud-config", Merge_Type="list(append)+dict()+str()"),
        ),
        ("a", "b"),
        "merge_how",
    ),
)
