"""A package repository in a guest: a shell script that makes it, and apt use it alone."""

from __future__ import annotations

REPOSITORY = """
set -e
mkdir -p /srv/repo/greeting/DEBIAN /srv/repo/greeting/usr/bin
cd /srv/repo
printf '#!/bin/sh\necho greetings\n' >greeting/usr/bin/greeting
chmod 755 greeting/usr/bin/greeting
control='Package: greeting
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@example.com>
Description: says hello'
echo "$control" >greeting/DEBIAN/control
dpkg-deb --build greeting greeting.deb
{ echo "$control"; echo "Filename: ./greeting.deb"; echo "Size: $(stat -c %s greeting.deb)"
  echo "SHA256: $(sha256sum greeting.deb | cut -d' ' -f1)"; } >Packages
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list
"""
