from __future__ import annotations

import logging
import re

import pytest
import yaml

from pycloudlib.util import (
    LTS_RELEASES,
    UBUNTU_RELEASE_VERSION_MAP,
    add_key_to_cloud_config,
    get_timestamped_tag,
    log_exception_list,
)

KEY = "ssh-ed25519 AAAAC3Nza user@host"


@pytest.mark.parametrize(
    ("series", "version"),
    [
        ("xenial", "16.04"),
        ("bionic", "18.04"),
        ("focal", "20.04"),
        ("jammy", "22.04"),
        ("noble", "24.04"),
        ("resolute", "26.04"),
    ],
)
def test_series_has_its_version(series: str, version: str) -> None:
    assert UBUNTU_RELEASE_VERSION_MAP[series] == version
    assert series in LTS_RELEASES


def test_versions_are_a_year_and_a_month() -> None:
    assert all(re.fullmatch(r"\d\d\.(04|10)", v) for v in UBUNTU_RELEASE_VERSION_MAP.values())


def test_long_term_releases_are_known_and_of_april_of_even_years() -> None:
    versions = [UBUNTU_RELEASE_VERSION_MAP[series] for series in LTS_RELEASES]

    assert versions == sorted(versions)
    assert all(int(v[:2]) % 2 == 0 and v.endswith(".04") for v in versions)
    assert "plucky" not in LTS_RELEASES


def test_timestamped_tag_stays_a_good_tag() -> None:
    assert re.fullmatch(r"mine-\d{4}-\d{12}", get_timestamped_tag("mine"))


@pytest.mark.parametrize("user_data", [None, "", "#cloud-config\n", "#cloud-config\n{}\n"])
def test_key_is_added_to_nothing(user_data: str | None) -> None:
    config = add_key_to_cloud_config(KEY, user_data)

    assert config.startswith("#cloud-config\n")
    assert yaml.safe_load(config) == {"ssh_authorized_keys": [KEY]}


def test_key_is_added_to_a_cloud_config() -> None:
    user_data = "#cloud-config\nruncmd: [echo]\nssh_authorized_keys: [other]\n"

    config = add_key_to_cloud_config(KEY, user_data)

    assert config.startswith("#cloud-config\n")
    assert yaml.safe_load(config) == {"runcmd": ["echo"], "ssh_authorized_keys": ["other", KEY]}


def test_key_that_is_there_already_is_not_doubled() -> None:
    once = add_key_to_cloud_config(KEY, None)

    assert add_key_to_cloud_config(KEY, once) == once


def test_empty_list_of_keys_is_filled() -> None:
    config = add_key_to_cloud_config(KEY, "#cloud-config\nssh_authorized_keys:\n")

    assert yaml.safe_load(config) == {"ssh_authorized_keys": [KEY]}


@pytest.mark.parametrize(
    "user_data",
    [
        "#cloud-config\n- a\n- list\n",
        "#cloud-config\nkey: [unclosed\n",
        "just text",
        "#!/bin/sh\necho hello\n",
        "#!/bin/sh\n# nothing to do\n",
        "## template: jinja\n#cloud-config\nruncmd: ['echo {{ v1.region }}']\n",
        "#cloud-config\nssh_authorized_keys: 5\n",
    ],
    ids=["list", "bad YAML", "text", "script", "comments", "template", "keys are no list"],
)
def test_user_data_of_another_kind_is_refused(user_data: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        add_key_to_cloud_config(KEY, user_data)

    assert "user_data" in str(caught.value)


def test_collected_errors_are_logged_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_exception_list([ValueError("first"), OSError("second")])

    assert "first" in caplog.text
    assert "second" in caplog.text


def test_no_errors_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_exception_list([])

    assert not caplog.records
