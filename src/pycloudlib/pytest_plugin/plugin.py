"""The pytest plugin: its options, marker and fixtures, and the hooks that report on machines.

`pytest --fixtures` prints the docstrings of the fixtures.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import ImageInUseError
from pycloudlib.pytest_plugin.ahead import Case, Wanted, find_next
from pycloudlib.pytest_plugin.machines import (
    InUse,
    Machines,
    PrepareVm,
    VmFactory,
    add_diagnosis,
    commands_for,
    save_artifacts,
)
from pycloudlib.qemu.host.budget import Capacity
from pycloudlib.qemu.host.ownership import Orphans, claim
from pycloudlib.qemu.imagenames import get_image
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.spec import DEFAULT_INSTANCE_TYPE
from pycloudlib.util import raise_cleanup_errors

_DEFAULT_IMAGE = "lts"
_MARKER = (
    "vm(image=…, instance_type=…, user_data=…): the machine that the fixtures vm, vm_factory and "
    "shared_vm make for a test"
)
_MARKER_KEYS = ("image", "instance_type", "user_data")
# So many of the tests that come next are looked at.
_LOOK_AHEAD = 20
# The property of a report with the commands for a kept machine.
_KEPT = "vm kept"

_IN_USE: pytest.StashKey[InUse] = pytest.StashKey()
_NEXT: pytest.StashKey[pytest.Item | None] = pytest.StashKey()
_MACHINES: pytest.StashKey[Machines] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, on the command line and in the configuration file."""
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
        help="keep the machines of tests that fail, and print how to log in to them",
    )
    group.addoption(
        "--vm-artifacts",
        metavar="DIR",
        help="save logs and more of the machines of tests that fail in this directory",
    )
    group.addoption(
        "--vm-ahead",
        metavar="N",
        help="start the machines of the next N tests while the present one runs, as far as there "
        "is room; 0 for none (default: vm_ahead of the configuration, else 1)",
    )
    parser.addini("vm_ahead", "for how many of the next tests machines are started ahead")
    parser.addini("vm_image", "image of the machines of tests")
    parser.addini("vm_instance_type", "size of the machines of tests, such as c2m2048")
    parser.addini("vm_processors", "number of processors for the machines of all workers")
    parser.addini("vm_memory_mib", "memory, in MiB, for the machines of all workers")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and make paths absolute."""
    config.addinivalue_line("markers", _MARKER)
    started_in = config.invocation_params.dir
    # As str: pytest-xdist sends options to its workers.
    if config.option.vm_artifacts is not None:
        config.option.vm_artifacts = str(started_in / config.option.vm_artifacts)
    if config.option.vm_image is not None:
        config.option.vm_image = _anchor(config.option.vm_image, started_in)


@pytest.fixture(scope="session")
def qemu_cloud(pytestconfig: pytest.Config) -> Iterator[Qemu]:
    """Return a QEMU cloud for all tests; all that it made is deleted after them."""
    keep = pytestconfig.option.vm_keep
    # Kept machines outlive the tests; nothing outlives a worker that is killed.
    orphans = Orphans.REAP_AFTER_CRASH.value if keep else None
    cloud = Qemu("pytest", timestamp_suffix=False, orphans=orphans)
    try:
        yield cloud
    finally:
        errors = cloud.clean()
        if keep:
            errors = [error for error in errors if not isinstance(error, ImageInUseError)]
            for image in map(Path, cloud.created_images):
                if image.exists():
                    # A kept machine is built on it: `prune` deletes it after that.
                    claim(image, Orphans.REAP)
        raise_cleanup_errors(errors, None)


@pytest.fixture(scope="session")
def vm_image(pytestconfig: pytest.Config, qemu_cloud: Qemu) -> str:
    """Return the id of the image of the tests' machines.

    It is that of `--vm-image`, else of `vm_image` in the configuration file. A `conftest.py` may
    define its own fixture instead, which builds or prepares an image.
    """
    given = pytestconfig.option.vm_image
    if given is None:
        given = _anchor(pytestconfig.getini("vm_image") or _DEFAULT_IMAGE, pytestconfig.rootpath)
    return _find_image(pytestconfig, qemu_cloud, given)


@pytest.fixture
def vm(vm_factory: VmFactory) -> QemuInstance:
    """Return a fresh machine that is ready; it is deleted after the test.

    The first one boots and is saved; from then on, also in later runs, each is a copy with its own
    hostname, machine-id and host key. The marker `vm` says which machine.
    """
    return vm_factory()


@pytest.fixture
def vm_factory(
    request: pytest.FixtureRequest, _vm_machines: Machines, _vm_in_use: InUse
) -> VmFactory:
    """Return a function that makes machines, which are deleted after the test; see `VmFactory`."""

    def make(
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | Path | None = None,
        **options: Any,
    ) -> QemuInstance:
        wanted = _read_wanted(request, image, instance_type, user_data)
        return _vm_machines.make(wanted, _vm_in_use, options)

    return make


@pytest.fixture
def shared_vm(
    request: pytest.FixtureRequest, _vm_machines: Machines, _vm_in_use: InUse
) -> QemuInstance:
    """Return a machine that tests use one after another; each finds it in the same state.

    It is rolled back to that state, disk and memory, before each test. Tests with different markers
    `vm` have different ones.
    """
    return _vm_machines.share(_read_wanted(request), _vm_in_use)


@pytest.fixture(scope="session")
def prepare_vm(request: pytest.FixtureRequest, _vm_machines: Machines) -> PrepareVm:
    """Return a function that prepares a machine and saves it, for tests that start from it.

    See `PrepareVm`; it is for fixtures of the session.
    """

    def make(
        prepare: Callable[[QemuInstance], object],
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | None = None,
    ) -> str:
        wanted = _read_wanted(request, image, instance_type, user_data)
        return _vm_machines.prepare(wanted, prepare)

    return make


@pytest.fixture(scope="session")
def _vm_machines(pytestconfig: pytest.Config, qemu_cloud: Qemu) -> Iterator[Machines]:
    usual = qemu_cloud.settings.capacity
    whole = Capacity(
        _read_number(pytestconfig, "vm_processors") or usual.processors,
        _read_number(pytestconfig, "vm_memory_mib") or usual.memory_mib,
    )
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    machines = pytestconfig.stash[_MACHINES] = Machines(
        qemu_cloud,
        qemu_cloud.settings.budget(whole),
        pytestconfig.getini("vm_instance_type") or DEFAULT_INSTANCE_TYPE,
        lambda holders: _report_wait(pytestconfig, holders),
        # The other half is for the remaining tests.
        kept_mib=whole.memory_mib // 2 // workers,
        ahead=_read_ahead(pytestconfig),
    )
    try:
        yield machines
    finally:
        machines.ahead.close()


@pytest.fixture
def _vm_in_use(request: pytest.FixtureRequest) -> Iterator[InUse]:
    test = Case.of(request.node)
    in_use = request.node.stash[_IN_USE] = InUse(test.name, test)
    with in_use.ending:
        yield in_use


# `hookwrapper` works in every pytest since 7.0.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Remember which test comes next."""
    item.stash[_NEXT] = nextitem
    yield
    del item.stash[_NEXT]
    machines = item.config.stash.get(_MACHINES, None)
    if machines is not None:
        machines.ahead.end(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start machines for the tests that come next already now, if this one's was started ahead.

    So two are made beside each other where tests take no time. Otherwise this one's comes first.
    """
    machines = item.config.stash.get(_MACHINES, None)
    if machines is not None and machines.ahead.has(item.nodeid):
        machines.ahead.start_for(find_next(_find_following(item)), item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Start machines for the tests that come next: this one has got its own by now."""
    machines = item.config.stash.get(_MACHINES, None)
    if machines is not None:
        machines.ahead.start_for(find_next(_find_following(item)))


def _find_following(item: pytest.Item) -> list[pytest.Item]:
    """Find the tests that run after one, as far as that is known."""
    following = item.stash.get(_NEXT, None)
    if following is None:
        return []
    items = item.session.items
    # A worker of pytest-xdist has all tests in its list, and runs those that it is given.
    if hasattr(item.config, "workerinput") or following not in items:
        return [following]
    at = items.index(following)
    return items[at : at + _LOOK_AHEAD]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Add the machines of a failed test to its report."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    in_use = item.stash.get(_IN_USE, None)
    if in_use is None:
        return
    if call.when == "teardown":
        # The machines are deleted by now; the test may be run again.
        del item.stash[_IN_USE]
    elif report.failed and call.excinfo is not None:
        for machine in in_use.machines:
            try:
                if machine.instance_dir.is_dir():  # the test has not deleted it
                    report_machine(machine, in_use, report, call.excinfo.value, item.config)
            except Exception as problem:  # noqa: BLE001 - the test's failure is what is reported
                text = f"{type(problem).__name__}: {problem}"
                report.sections.append((f"machine {machine.name}: incomplete report", text))


def report_machine(
    machine: QemuInstance,
    in_use: InUse,
    report: pytest.TestReport,
    error: BaseException,
    config: pytest.Config,
) -> None:
    """Add what is known of a machine to the report of a test, and keep its artifacts."""
    # An error of the only machine contains its diagnosis already.
    if len(in_use.machines) > 1 or getattr(error, "diagnosis", None) is None:
        add_diagnosis(machine, report)
    if config.option.vm_artifacts is not None:
        save_artifacts(machine, report, error, Path(config.option.vm_artifacts))
    if not config.option.vm_keep:
        return
    if config.stash[_MACHINES].keep(machine, in_use):
        commands = commands_for(machine)
        report.sections.append((f"machine {machine.name} is kept", commands))
        report.user_properties.append((_KEPT, f"{report.nodeid}\n{commands}"))
    else:
        why = "kept machines have half of the memory of the budget already"
        report.sections.append((f"machine {machine.name} is not kept", why))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the kept machines at the end of the run."""
    kept = [
        text
        for reports in terminalreporter.stats.values()
        for report in reports
        # There are reports of other kinds, too.
        for name, text in getattr(report, "user_properties", ())
        if name == _KEPT
    ]
    if kept:
        terminalreporter.section("machines that are kept")
        for text in kept:
            terminalreporter.line(text)


def _read_wanted(
    request: pytest.FixtureRequest,
    image: str | None = None,
    instance_type: str | None = None,
    user_data: str | bytes | Path | None = None,
) -> Wanted:
    """Return the machine that a test wants: by arguments, its marker, and the run's options."""
    marked = _read_marker(request)
    # Relative to the test's file, wherever pytest was started.
    of_session = request.scope == "session"
    directory = request.config.rootpath if of_session else request.path.parent
    image = image or marked.get("image")
    user_data = marked.get("user_data") if user_data is None else user_data
    if isinstance(user_data, Path):
        user_data = (directory / user_data).read_bytes()
    return Wanted(
        request.getfixturevalue("vm_image")
        if image is None
        else _find_image(
            request.config, request.getfixturevalue("qemu_cloud"), _anchor(str(image), directory)
        ),
        instance_type or marked.get("instance_type"),
        user_data,
    )


def _read_marker(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the arguments of a test's markers `vm`; the marker closest to the test wins."""
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


def _read_ahead(config: pytest.Config) -> int:
    given = config.option.vm_ahead
    text, source = (given, "") if given is not None else (config.getini("vm_ahead"), config.inipath)
    text = str(text or "1")
    if not text.isdecimal():
        where = f"vm_ahead is {text!r} in {source}" if source else f"--vm-ahead is {text!r}"
        raise pytest.UsageError(f"{where}, expected a number of tests, or 0")
    return int(text)


def _read_number(config: pytest.Config, name: str) -> int | None:
    text = str(config.getini(name) or "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise pytest.UsageError(f"{name} is {text!r} in {config.inipath}, expected a number from 1")
    return int(text)


def _anchor(image: str, directory: Path) -> str:
    """Return the absolute path of an image that is a file in a directory; else its name."""
    return str(directory / image) if (directory / image).is_file() else image


def _find_image(config: pytest.Config, cloud: Qemu, text: str) -> str:
    """Return the id of the image that a name means; show a download or build while it runs."""
    with _uncaptured(config):
        return get_image(cloud, text, daily=False, on_progress=None)


def _report_wait(config: pytest.Config, holders: str) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        with _uncaptured(config):
            reporter.write_line(f"waiting until a machine fits: {holders} processors")


def _uncaptured(config: pytest.Config) -> contextlib.AbstractContextManager[None]:
    """Show inside the block what is printed at once."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        return contextlib.nullcontext()
    shown: contextlib.AbstractContextManager[None] = capture.global_and_fixture_disabled()
    return shown
