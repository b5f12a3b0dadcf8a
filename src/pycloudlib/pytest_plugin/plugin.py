"""The pytest plugin: options, the marker, fixtures, and what a failed test tells.

Each fixture says what it gives; `pytest --fixtures` lists them. What they need is imported when the
first of them is used: those who do not use them do not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pycloudlib import Qemu
    from pycloudlib.pytest_plugin.machines import InUse, Machines, VmFactory
    from pycloudlib.qemu.instance import QemuInstance

_DEFAULT_IMAGE = "lts"
_MARKER = (
    "vm(image=…, instance_type=…, user_data=…): what machine the fixtures vm, vm_factory and "
    "shared_vm give to a test"
)
_MARKER_KEYS = ("image", "instance_type", "user_data")
# The name of the property of a report that tells how to get into a machine.
_KEPT = "vm kept"

_IN_USE: pytest.StashKey[InUse] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and what may stand for them in the configuration file."""
    group = parser.getgroup("pycloudlib", "virtual machines (pycloudlib)")
    group.addoption(
        "--vm-image",
        metavar="IMAGE",
        help="image of the machines of tests: a release (noble, bookworm), a snapshot, or a path "
        f"(default: vm_image of the configuration, else {_DEFAULT_IMAGE})",
    )
    group.addoption(
        "--vm-keep",
        action="store_true",
        help="keep the machines of tests that fail, and tell how to get in",
    )
    group.addoption(
        "--vm-artifacts",
        metavar="DIR",
        help="keep logs and more of the machines of tests that fail in this directory",
    )
    parser.addini("vm_image", "image of the machines of tests")
    parser.addini("vm_instance_type", "size of the machines of tests, such as c2m2048")
    parser.addini("vm_processors", "how many processors the machines of all workers may have")
    parser.addini("vm_memory_mib", "how much memory, in MiB, the machines of all workers may have")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and paths independent of the current directory."""
    config.addinivalue_line("markers", _MARKER)
    artifacts = config.option.vm_artifacts
    if artifacts is not None:
        # A text: pytest-xdist hands options on to its workers.
        config.option.vm_artifacts = str(config.invocation_params.dir / artifacts)


@pytest.fixture(scope="session")
def qemu_cloud(pytestconfig: pytest.Config) -> Iterator[Qemu]:
    """Give a QEMU cloud for all tests: what it makes is deleted when they have ended."""
    from pycloudlib import Qemu  # noqa: PLC0415 - heavy
    from pycloudlib.errors import CleanupError, ImageInUseError  # noqa: PLC0415

    keep = pytestconfig.option.vm_keep
    cloud = Qemu("pytest", timestamp_suffix=False, orphans="keep" if keep else None)
    try:
        yield cloud
    finally:
        # What a machine that is kept is built on is kept, too.
        errors = [e for e in cloud.clean() if not (keep and isinstance(e, ImageInUseError))]
        if errors:
            raise CleanupError(errors)


@pytest.fixture(scope="session")
def vm_image(pytestconfig: pytest.Config, qemu_cloud: Qemu) -> str:
    """Give the id of the image that the machines of tests are made from.

    It is that of `--vm-image`, else of `vm_image` in the configuration file. A `conftest.py` may
    have one of its own instead, which builds an image or saves a machine that it has prepared.
    """
    wanted = pytestconfig.option.vm_image or pytestconfig.getini("vm_image") or _DEFAULT_IMAGE
    return _get_image(pytestconfig, qemu_cloud, wanted)


@pytest.fixture
def vm(vm_factory: VmFactory) -> QemuInstance:
    """Give a fresh machine, ready, which is deleted after the test.

    The first one boots and is saved; from then on, also in later runs, each is a copy, somebody of
    its own. The marker `vm` says what machine.
    """
    return vm_factory()


@pytest.fixture
def vm_factory(
    request: pytest.FixtureRequest, _vm_machines: Machines, _vm_in_use: InUse
) -> VmFactory:
    """Give a function that makes machines, which are deleted after the test; see `VmFactory`."""

    def make(
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | Path | None = None,
        **options: Any,
    ) -> QemuInstance:
        given = {"image": image, "instance_type": instance_type, "user_data": user_data}
        wanted = _read_wanted(request, {key: v for key, v in given.items() if v is not None})
        return _vm_machines.give(wanted, _vm_in_use, options)

    return make


@pytest.fixture
def shared_vm(
    request: pytest.FixtureRequest, _vm_machines: Machines, _vm_in_use: InUse
) -> QemuInstance:
    """Give a machine that tests use one after another; each finds it as it was at its beginning.

    It is taken back to that moment, disk and memory, before each test, which takes less than a
    copy. Tests with different markers `vm` have different ones.
    """
    return _vm_machines.share(_read_wanted(request, {}), _vm_in_use)


@pytest.fixture(scope="session")
def _vm_machines(pytestconfig: pytest.Config, qemu_cloud: Qemu) -> Machines:
    from pycloudlib.pytest_plugin.budget import Budget, Room  # noqa: PLC0415
    from pycloudlib.pytest_plugin.machines import Machines  # noqa: PLC0415

    host = Room.of_host()
    room = Room(
        _read_number(pytestconfig, "vm_processors") or host.processors,
        _read_number(pytestconfig, "vm_memory_mib") or host.memory_mib,
    )
    return Machines(qemu_cloud, Budget(qemu_cloud.working_dir / ".pytest-budget", room))


@pytest.fixture
def _vm_in_use(request: pytest.FixtureRequest) -> Iterator[InUse]:
    from pycloudlib.pytest_plugin.machines import InUse  # noqa: PLC0415

    in_use = request.node.stash[_IN_USE] = InUse(request.node.name)
    with in_use.ending:
        yield in_use


# In the manner that every pytest since 7.0 knows.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Let the report of a failed test tell of its machines."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    in_use = item.stash.get(_IN_USE, None)
    # At its end they are gone.
    if in_use is None or not report.failed or call.when == "teardown" or call.excinfo is None:
        return
    from pycloudlib.pytest_plugin.report import tell_kept, tell_of  # noqa: PLC0415

    artifacts = item.config.option.vm_artifacts
    for machine in in_use.machines:
        directory = None if artifacts is None else Path(artifacts)
        tell_of(machine, report, call.excinfo.value, directory)
        if item.config.option.vm_keep:
            in_use.kept = True
            way_in = tell_kept(machine)
            report.sections.append((f"machine {machine.name} is kept", way_in))
            report.user_properties.append((_KEPT, f"{report.nodeid}\n{way_in}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell, at the end, what machines are kept."""
    reports = [r for how in ("failed", "error") for r in terminalreporter.stats.get(how, ())]
    kept = [text for report in reports for name, text in report.user_properties if name == _KEPT]
    if kept:
        terminalreporter.section("machines that are kept")
        for text in kept:
            terminalreporter.line(text)


def _read_wanted(request: pytest.FixtureRequest, given: dict[str, Any]) -> Any:
    """Say what machine a test wants: by arguments, by its marker, and by the options of the run."""
    from pycloudlib.pytest_plugin.machines import Wanted  # noqa: PLC0415
    from pycloudlib.qemu.spec import DEFAULT_INSTANCE_TYPE  # noqa: PLC0415

    wanted = {**_read_marker(request), **given}
    image = wanted.get("image")
    cloud: Qemu = request.getfixturevalue("qemu_cloud")
    user_data = wanted.get("user_data")
    if isinstance(user_data, Path):
        # As the test's own file is meant, wherever pytest was started.
        user_data = (request.path.parent / user_data).read_bytes()
    return Wanted(
        request.getfixturevalue("vm_image")
        if image is None
        else _get_image(request.config, cloud, str(image)),
        wanted.get("instance_type")
        or request.config.getini("vm_instance_type")
        or DEFAULT_INSTANCE_TYPE,
        user_data,
    )


def _read_marker(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Read the markers `vm` of a test; the one that is closest to it wins."""
    wanted: dict[str, Any] = {}
    for marker in request.node.iter_markers("vm"):
        unknown = [repr(key) for key in marker.kwargs if key not in _MARKER_KEYS]
        if marker.args or unknown:
            wrong = ", ".join([*map(repr, marker.args), *unknown])
            raise pytest.UsageError(
                f"{request.node.nodeid}: the marker vm takes {', '.join(_MARKER_KEYS)}, each by "
                f"its name, not {wrong}"
            )
        wanted = {**marker.kwargs, **wanted}
    return wanted


def _read_number(config: pytest.Config, name: str) -> int | None:
    text = str(config.getini(name) or "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise pytest.UsageError(f"{name} is {text!r} in {config.inipath}, expected a number from 1")
    return int(text)


def _get_image(config: pytest.Config, cloud: Qemu, text: str) -> str:
    """Give the id of an image by what people call it; what takes long is shown while it goes on."""
    from pycloudlib.cli.imagenames import get_image  # noqa: PLC0415

    capture: Any = config.pluginmanager.getplugin("capturemanager")
    shown = contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled()
    with shown:
        return get_image(cloud, text, daily=False, on_progress=None)
