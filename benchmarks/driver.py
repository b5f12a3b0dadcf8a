"""Runs the courses in turn, each in a process of its own, and keeps what they tell."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from benchmarks.environments import Environment, make_original, make_ours
from benchmarks.measurements import Measurement, Results, Run
from benchmarks.plan import Plan
from benchmarks.processes import find_qemu
from benchmarks.report import Figure, write_figure, write_report
from benchmarks.scenarios import BY_KEY, NAMES, ORIGINAL, OURS, SIDES, turns
from benchmarks.wrapper import write_wrapper
from pycloudlib import Qemu
from pycloudlib._base.files import replace_atomically
from pycloudlib._base.tools import find_tool
from pycloudlib.key import KeyPair, generate_key_pair
from pycloudlib.qemu.host.accelerator import AUTO, Accelerator, Choice, choose_accelerator
from pycloudlib.qemu.parts.standard import accel_option
from pycloudlib.qemu.state.settings import DEFAULT_BINARY, find_cache_directory
from scripts.measure import measure_import

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "linux-image-amd64"
"""Debian's generic kernel: the original's machines have an IDE disk and an e1000 card."""
# How long a course may take to clean up after Ctrl-C.
_END_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be measured, and how.

    Attributes:
        output: Directory of everything that stays.
        wheel: This package's wheel.
        rounds: How many rounds.
        wanted: Keys of the scenarios.
        side: The only package to measure, or None for both.
        machines: How many machines where there are to be many.
        instance_type: Size of the machines.
        release: Debian release of the image.
        dead_limit: Seconds that the error of a dead QEMU is waited for.
        append: Whether results that are there are added to.
    """

    output: Path
    wheel: Path | None
    rounds: int
    wanted: tuple[str, ...]
    side: str | None
    machines: int
    instance_type: str
    release: str
    dead_limit: float
    append: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """What courses run on.

    Attributes:
        options: What is to be measured.
        environments: The installed packages.
        image: The image that machines boot from.
        key: The SSH key of the machines, the same for both packages.
        accelerator: What works here.
        qemu: The QEMU.
    """

    options: Options
    environments: dict[str, Environment]
    image: str
    key: KeyPair
    accelerator: Accelerator
    qemu: Path

    def write_config(self, side: str, directory: Path) -> Path:
        """Write a package's configuration; its machines are below the directory."""
        working_dir = directory / "machines"
        working_dir.mkdir()
        qemu = self.qemu
        if side == ORIGINAL and self.accelerator is not Accelerator.KVM:
            qemu = directory / "qemu-system-x86_64"
            accelerator = self.accelerator
            write_wrapper(qemu, str(self.qemu), accel_option(accelerator), accelerator.cpu_model)
        settings = {
            "image_dir": str(self.options.output.resolve() / "images"),
            "working_dir": str(working_dir),
            "qemu_binary": str(qemu),
            "public_key_path": self.key.public_key_path,
            "private_key_path": self.key.private_key_path,
        }
        # A JSON text is a TOML string.
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        config = directory / "pycloudlib.toml"
        config.write_text("\n".join(["[qemu]", *lines]) + "\n")
        return config


def prepare(options: Options, sides: set[str]) -> tuple[Stage, dict[str, str]]:
    """Install the packages and build the image, where that has not been done; tell the facts.

    Args:
        options: What is to be measured.
        sides: The packages that are needed for it.
    """
    output = options.output.resolve()
    for name in ("images", "logs", "key"):
        (output / name).mkdir(parents=True, exist_ok=True)
    qemu = find_tool(DEFAULT_BINARY)
    choice = choose_accelerator(AUTO, qemu, find_cache_directory())
    environments = {}
    if ORIGINAL in sides:
        find_tool("genisoimage")
        _tell("installing the original (once)")
        environments[ORIGINAL] = make_original(output / ORIGINAL)
    if OURS in sides:
        _tell("installing this package")
        if options.wheel is None:
            raise ValueError("this package's wheel has to be named, as `make wheel` made it")
        environments[OURS] = make_ours(output / OURS, options.wheel)
    _tell(f"an image of {options.release} with {KERNEL} (built once)")
    with tempfile.TemporaryDirectory(prefix="pycl-bench-") as name:
        config = Path(name) / "pycloudlib.toml"
        config.write_text(f"[qemu]\nimage_dir = {json.dumps(str(output / 'images'))}\n")
        with Qemu(tag="bench", config_file=config) as cloud:
            image = cloud.build_image(options.release, kernel=KERNEL)
    private = output / "key" / "id_ed25519"
    key = KeyPair(f"{private}.pub", str(private), "bench")
    if not private.exists():
        key = generate_key_pair(private.parent, "bench")
    stage = Stage(options, environments, image, key, choice.accelerator, qemu)
    return stage, _facts(stage, choice)


def _facts(stage: Stage, choice: Choice) -> dict[str, str]:
    """Tell what is to be known of the host, the image and the packages."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    qemu = subprocess.run([stage.qemu, "--version"], capture_output=True, text=True, check=True)
    image_size = Path(stage.image).stat().st_size
    environments = stage.environments
    return {
        "date": datetime.date.today().isoformat(),
        "host": f"{len(models)} x {models[0] if models else platform.machine()}, "
        f"{memory / 2**30:.0f} GiB, Linux {platform.release()}",
        "accelerator": f"{choice.accelerator.value} ({choice.reason})",
        "QEMU": qemu.stdout.partition("\n")[0],
        "Python": platform.python_version(),
        "image": f"{stage.options.release} with {KERNEL}, {image_size >> 20} MiB",
        "machines": stage.options.instance_type,
        "machines at once": str(stage.options.machines),
        **{
            NAMES[side]: (f"{environment.requirement}, {environment.count_packages()} packages")
            for side, environment in environments.items()
        },
    }


class Driver:
    """Measures everything that is wanted.

    Args:
        options: What is wanted.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._results = Results({})

    def run(self) -> Results:
        """Run all courses in turn; what is measured is kept after each."""
        options = self._options
        allowed = SIDES if options.side is None else (options.side,)
        order = [turn for turn in turns(options.rounds, options.wanted) if turn[1] in allowed]
        stage, facts = prepare(options, {side for _, side, _ in order})
        self._results = Results(facts)
        if options.append and self._file.exists():
            before = Results.read(self._file)
            # What is known of a package that is left out this time is kept.
            self._results = Results({**before.facts, **facts}, before.runs)
        for number, (round_, side, course) in enumerate(order, 1):
            _tell(f"[{number}/{len(order)}] round {round_}, {side}, course {course!r}")
            self._measure(stage, side, course, round_)
        return self._results

    def _measure(self, stage: Stage, side: str, course: str, round_: int) -> None:
        """Run a course and keep what it told; also that of one that is interrupted."""
        began, load, started = _now(), os.getloadavg()[0], time.perf_counter()
        told: list[Measurement] = []
        leftovers = 0
        log = self._options.output / "logs" / f"{side}-{course}-{round_}.log"
        try:
            if course == "package":
                measure_package(stage.environments[side], self._options.wanted, told)
                return
            with tempfile.TemporaryDirectory(prefix="pycl-bench-") as name:
                directory = Path(name).resolve()
                try:
                    _run_course(stage, side, course, directory, log, told)
                finally:
                    leftovers = end_qemus(str(directory))
        finally:
            seconds = time.perf_counter() - started
            self._keep(Run(side, course, round_, began, seconds, load, tuple(told), leftovers))

    def _keep(self, run: Run) -> None:
        """Write everything that is known."""
        self._results = replace(self._results, runs=(*self._results.runs, run))
        with replace_atomically(self._file) as temporary:
            temporary.write_text(self._results.to_json())
        with replace_atomically(self._options.output / "report.md") as temporary:
            temporary.write_text(write_report(self._results))

    @property
    def _file(self) -> Path:
        return self._options.output / "results.json"


def measure_package(
    environment: Environment, wanted: tuple[str, ...], told: list[Measurement]
) -> None:
    """Measure what needs no machine: the time of an import, the size of the installation."""
    if "import" in wanted:
        milliseconds = measure_import(environment.installation)
        told.append(Measurement("import", tuple(value / 1000 for value in milliseconds)))
        _tell_measured(told[-1])
    if "size" in wanted:
        told.append(Measurement("size", (environment.installation.size / 1e6,)))
        _tell_measured(told[-1])


def _run_course(
    stage: Stage, side: str, course: str, directory: Path, log: Path, told: list[Measurement]
) -> None:
    """Run a course in the environment of a package.

    Args:
        stage: What it runs on.
        side: Which package.
        course: Which course.
        directory: A directory of its own, for everything that goes after it.
        log: Where its output goes.
        told: Where what it tells is put as it comes.
    """
    scratch = directory / "scratch"
    scratch.mkdir()
    plan = Plan(
        image=stage.image,
        instance_type=stage.options.instance_type,
        config_file=str(stage.write_config(side, directory)),
        scratch=str(scratch),
        machines=stage.options.machines,
        wanted=stage.options.wanted,
        dead_limit=stage.options.dead_limit,
    )
    python = str(stage.environments[side].installation.python)
    argv = [python, "-m", f"benchmarks.courses.{course}", plan.to_argument()]
    with log.open("w") as output, running(argv, output) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(Measurement.from_json(json.loads(line)))
            _tell_measured(told[-1])
    if process.returncode:
        _tell(f"  stopped with exit status {process.returncode}: see {log}")


@contextlib.contextmanager
def running(argv: list[str], output: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a course; it is told to clean up when the block is left by an error or by Ctrl-C."""
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        # Ctrl-C is for the driver, which ends the course in a way that it can clean up after.
        start_new_session=True,
    )
    try:
        yield process
        process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def end_qemus(directory: str) -> int:
    """End the QEMU processes whose machines are below a directory; give how many there were."""
    pids = find_qemu(directory)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _tell_measured(measurement: Measurement) -> None:
    scenario = BY_KEY[measurement.scenario]
    figure = Figure(() if measurement.figure is None else (measurement.figure,), ())
    _tell(f"  {scenario.key}: {measurement.problem or write_figure(scenario, figure)}")


def _tell(line: str) -> None:
    print(line, flush=True)
