"""Every wait in the code: how long it may take, what ends it early, and which test shows it."""

from __future__ import annotations

import ast
import importlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT

SOURCE = ROOT / "src" / "pycloudlib"
TABLE = ROOT / "docs" / "explanation" / "reliability.md"


@dataclass(frozen=True)
class Wait:
    """A wait.

    Attributes:
        what: What is waited for.
        limit: For how long.
        early: What ends it before.
        places: The functions that wait, as `module:function`.
        shown: The tests that show its end, as `layer/file::test`.
        seconds: The limits that the code has, as `module:NAME`, with their seconds.
    """

    what: str
    limit: str
    early: str
    places: tuple[str, ...]
    shown: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...] = ()


_DEAD = "QEMU's end, a dead end of the boot, a long pause, a full disk of the host"
_GONE = "QEMU's end, a kernel panic, a full disk of the host"
_END = "QEMU's end"
_SETTLED = "without cloud-init, an SSH server that answers"
_OTHER = "none: as long as what the other does, which has limits of its own"

WAITS = (
    Wait(
        "a machine to be ready (`wait()`, `restart()`, `start()`)",
        "`ready_timeout`: 10 minutes with KVM, 20 in emulation",
        _DEAD + ", a refused login or a missing SSH server after cloud-init's end",
        (
            "guest.boot.readiness:Readiness._wait_for_execute",
            "guest.boot.readiness:Readiness._ask_cloudinit",
            "qemu.instance:QemuInstance.start",
            "qemu.instance:QemuInstance.wait",
            "qemu.instance:QemuInstance.wait_until_well",
            "qemu.saved.checkpoint:_clean_running",
            "cli.lifecycle:wait_until_ready",
            "pytest_plugin.machines:Machines._make_shared",
            "pytest_plugin.machines:Machines._return_to_start",
            "pytest_plugin.machines:Machines.make",
            "guest.boot.readiness:BootWatch._follow",
            "guest.boot.readiness:BootWatch.__exit__",
        ),
        (
            "unit/guest/access/test_half_alive.py::test_limit_of_a_wait_bounds_connecting",
            "unit/guest/boot/test_readiness.py::test_refusal_after_the_end_of_cloud_init_is_final",
            "unit/guest/boot/test_readiness.py::test_guest_that_never_goes_down_is_told",
            "qemu/failure/test_failures.py::test_qemu_that_is_killed_while_it_is_waited_for",
            "qemu/vm/test_pauses.py::test_machine_that_is_stopped_is_not_waited_for",
            "qemu/vm/test_typed_console.py::test_machine_at_its_end_is_told_in_seconds",
        ),
        (
            ("guest.boot.readiness:_ATTEMPT_LIMIT", 2.0),
            ("guest.boot.readiness:SERVER_GRACE", 120.0),
        ),
    ),
    Wait(
        "an SSH server to name itself",
        "`banner_timeout`, 10 s; 2 s for each attempt of `wait()`; never past the caller's limit",
        "the connection's end, another protocol",
        ("guest.access.ssh:open_with_banner", "guest.access.ssh:_await_banner"),
        (
            "unit/guest/access/test_half_alive.py::test_part_of_a_banner_costs_no_processor",
            "unit/guest/access/test_half_alive.py::test_other_servers_are_told_at_once",
            "unit/guest/access/test_half_alive.py::test_server_that_hangs_up_in_its_banner_is_told_at_once",
        ),
        (("instance:_BANNER_LIMIT", 10.0),),
    ),
    Wait(
        "a login, from there on",
        "120 s in all, 60 s for each answer; never past the caller's limit",
        "the connection's end",
        (),
        ("unit/guest/access/test_half_alive.py::test_login_ends_at_its_deadline",),
        (("guest.access.ssh:LOGIN_LIMIT", 120.0), ("guest.access.ssh:ANSWER_LIMIT", 60.0)),
    ),
    Wait(
        "an SSH session, while others have all of them",
        "`timeout` of the command; else as long as connecting",
        "a session that ends",
        ("guest.access.sessions:Connections._take", "guest.access.sessions:Connections._open_on"),
        (
            "unit/guest/access/test_sessions.py::test_many_threads_get_sessions_whatever_the_server_allows",
            "unit/guest/access/test_half_alive.py::test_limit_of_a_command_bounds_connecting",
        ),
    ),
    Wait(
        "a command (`execute()`, `run_script()` …)",
        "`timeout`, connecting included; none by default; the wait's within `wait()`",
        _GONE + ", a reboot of the guest",
        (
            "guest.access.commands:_have_ended",
            "guest.access.commands:_has_status",
            "guest.access.commands:_run_leaving",
            "guest.access.commands:LeftShell.end",
        ),
        (
            "unit/guest/access/test_sessions.py::test_a_command_whose_time_is_over_is_ended",
            "unit/guest/access/test_commands.py::test_what_is_found_while_waiting_ends_the_command",
            "qemu/failure/test_failures.py::test_command_in_a_guest_that_boots_anew_is_not_waited_for",
            "unit/guest/access/test_half_alive.py::test_command_whose_status_never_comes_is_not_waited_for",
        ),
    ),
    Wait(
        "a command whose time is over to be ended in the guest",
        "15 s; up to 120 s more in the background",
        "its end",
        ("guest.access.commands:_end", "guest.access.commands:_end.end"),
        (
            "unit/guest/access/test_sessions.py::test_commands_whose_time_is_over_leave_the_machine_usable",
        ),
        (("guest.access.commands:_END_WAIT", 15.0), ("guest.access.commands:_END_LIMIT", 120.0)),
    ),
    Wait(
        "`push_file()`, `pull_file()`",
        "60 s for each answer, or for a byte to move on the helper's port",
        _GONE + ", a reboot of the guest",
        (
            "guest.access.commands:interrupt_when.watch",
            "guest.access.portstream:_Raw._when",
            "qemu.vm.fileport:MachineFilePort._by_ssh",
            "guest.access.sessions:Connections.files",
            "guest.access.sessions:Session.wait_for_end",
        ),
        (
            "unit/cli/test_inside.py::test_file_of_a_guest_whose_kernel_panics_is_not_waited_for",
            "unit/guest/access/test_portstream.py::test_a_check_ends_the_wait",
            "unit/guest/access/test_portstream.py::test_a_connection_on_which_nothing_moves_is_given_up",
        ),
        (
            ("guest.access.portstream:_STALL_LIMIT", 60.0),
            ("qemu.vm.fileport:_END_LIMIT", 3.0),
            ("guest.access.sessions:_FILE_ANSWER_LIMIT", 60.0),
            ("guest.access.sessions:_END_LIMIT", 3.0),
        ),
    ),
    Wait(
        "`pycloudlib exec`, `shell`",
        "none",
        _GONE,
        (
            "cli.inside:_run",
            "cli.terminal:SshTerminal.wait",
            "cli.terminal:SshTerminal.receive",
            "cli.terminal:relay",
            "cli.terminal:write_all",
        ),
        (
            "unit/cli/test_inside.py::test_command_ends_with_the_guests_kernel",
            "unit/cli/test_terminal.py::test_end_of_the_other_side_restores_the_terminal",
        ),
    ),
    Wait(
        "a session on the SSH connection that the command line keeps",
        "2 s for the process on this host, 3 s for the guest, 60 s for the login shell; then "
        "another connection is made, and the session opened there",
        "the end of that process",
        (
            "guest.access.kept:_read_mark",
            "guest.access.mux:Channel.recv",
            "guest.access.mux:Channel.recv_stderr",
            "guest.access.mux:Channel.recv_exit_status",
            "guest.access.mux:Master._read",
        ),
        (
            "unit/guest/access/test_kept.py::test_guest_that_answers_no_more_is_connected_to_anew",
            "unit/guest/access/test_kept.py::test_keeper_that_was_killed_leaves_nothing_in_the_way",
        ),
        (
            ("guest.access.kept:_MASTER_LIMIT", 2.0),
            ("guest.access.kept:OPEN_LIMIT", 3.0),
            ("guest.access.ssh:ANSWER_LIMIT", 60.0),
        ),
    ),
    Wait(
        "that connection to be made, also by another program",
        "60 s; 5 s until the server names itself; then one is made that is not kept",
        "the end of `ssh`",
        ("guest.access.kept:Keeper._run_master",),
        ("unit/guest/access/test_kept.py::test_another_host_key_is_not_accepted",),
        (("guest.access.ssh:ANSWER_LIMIT", 60.0), ("guest.access.kept:_BANNER_LIMIT", 5)),
    ),
    Wait(
        "`pycloudlib copy`",
        "none; 10 s for the last words of one that failed",
        _GONE,
        ("cli.transfer:_Command.finish", "cli.transfer:_Reader.readinto"),
        ("unit/cli/test_inside.py::test_copy_ends_with_the_guests_kernel",),
        (("cli.transfer:LAST_WORDS_LIMIT", 10.0),),
    ),
    Wait(
        "`pycloudlib console`",
        "none; 3 s until it is free, 10 s to connect",
        f"Ctrl-], {_END}",
        (
            "cli.inside:wait_for_console",
            "cli.terminal:SerialConsole.__init__",
            "cli.terminal:SerialConsole.receive",
        ),
        (
            "qemu/cli/test_commandline.py::test_console_is_left_by_its_key",
            "qemu/vm/test_handles.py::test_a_console_that_is_open_elsewhere_says_where",
        ),
        (("cli.inside:CONSOLE_LIMIT", 3.0), ("cli.terminal:_CONNECT_LIMIT", 10.0)),
    ),
    Wait(
        "`pycloudlib logs --follow`",
        "none",
        f"Ctrl-C, {_END}",
        ("cli.reports:read_log",),
        (
            "qemu/cli/test_commandline.py::test_log_is_followed_until_the_machine_is_off",
            "qemu/cli/test_commandline.py::test_ctrl_c_ends_a_followed_log",
        ),
    ),
    Wait(
        "an answer of the helper in a guest",
        "`timeout` of the command; 60 s for what makes a copy its own, and for it to appear",
        _GONE + ", a helper that is gone or says what is no answer",
        (
            "guest.helper:HelperConnection._fill",
            "qemu.vm.helper:HelperLink._is_ready",
            "qemu.vm.helper:HelperLink.wait_until_up",
            "qemu.saved.checkpoint:_prepare",
        ),
        (
            "unit/guest/test_helper.py::test_answer_that_does_not_come_is_not_waited_for_longer",
            "unit/guest/test_helper.py::test_helper_that_is_gone_is_told",
            "unit/guest/test_helper.py::test_line_without_an_end_is_not_taken_for_ever",
            "qemu/vm/test_pauses.py::test_qemu_that_stands_still_holds_up_no_limit",
        ),
        (("qemu.vm.helper:_FIX_LIMIT", 60.0), ("qemu.vm.helper:_APPEAR_LIMIT", 60.0)),
    ),
    Wait(
        "the helper, while others use it",
        "not at all for commands, which SSH runs then; 60 s for what makes a copy its own",
        "its turn",
        (),
        ("qemu/vm/test_handles.py::test_a_helper_whose_socket_others_hold_is_not_waited_for",),
    ),
    Wait(
        "the helper's port, while another file is copied",
        "as long as SSH would take for the file, 60 s at most; then SSH copies it. 10 s for a "
        "save, 60 s if it has to start the helper; then it goes without",
        "its turn",
        ("qemu.vm.helper:HelperLink._is_closed",),
        (
            "qemu/vm/test_handles.py::test_a_port_that_others_have_is_left_to_them",
            "qemu/vm/test_pauses.py::test_no_helper_is_started_on_a_port_that_is_in_use",
        ),
        (("qemu.vm.fileport:_LONGEST_TURN", 60.0), ("qemu.vm.helper:_SYNC_TURN", 10.0)),
    ),
    Wait(
        "the helper, after a copy that was cut off",
        "three times 3.5 s; then SSH does its work",
        "its answer",
        ("qemu.vm.helper:HelperLink._has_port",),
        ("qemu/vm/test_handles.py::test_a_helper_that_has_lent_its_port_is_asked_first",),
        (("qemu.vm.helper:RECOVER_LIMIT", 2.0), ("qemu.vm.helper:RECOVER_PAUSE", 1.5)),
    ),
    Wait(
        "an SSH server that has been given a new key",
        "30 s",
        _GONE,
        ("qemu.vm.guest:Guest._wait_for_banner",),
        ("unit/guest/access/test_half_alive.py::test_part_of_a_banner_costs_no_processor",),
        (("qemu.vm.guest:_BANNER_LIMIT", 30.0),),
    ),
    Wait(
        "QEMU's end, when a connection to its guest has ended",
        "0.5 s",
        _END,
        ("qemu.vm.guest:Guest.run", "qemu.vm.guest:Guest.naming_end"),
        ("qemu/failure/test_failures.py::test_qemu_that_is_killed_while_it_is_waited_for",),
        (("qemu.vm.guest:_END_GRACE", 0.5),),
    ),
    Wait(
        "certainty that a guest is dead",
        "6 s",
        "any sign of life",
        ("qemu.vm.vitality:DeadEndCheck.check_kernel",),
        (
            "unit/qemu/vm/test_vitality.py::test_machine_that_does_nothing_has_ended",
            "unit/qemu/vm/test_vitality.py::test_machine_whose_ssh_server_answers_has_not_ended",
        ),
        (("qemu.vm.vitality:_DOUBT_LIMIT", 6.0),),
    ),
    Wait(
        "a machine to be off (`shutdown()`, `wait_for_stop()`)",
        "120 s; `shutdown()` uses force after nine tenths, or at once if it is paused",
        f"{_END}; for `wait_for_stop()` a long pause",
        (
            "qemu.vm.machine:Machine.power_off",
            "qemu.vm.machine:Machine.wait_for_end",
            "qemu.vm.machine:Machine.wait_until_off",
        ),
        (
            "qemu/vm/test_handles.py::test_a_guest_that_cannot_react_is_not_waited_for",
            "qemu/vm/test_pauses.py::test_machine_that_is_stopped_is_not_waited_for",
        ),
        (("qemu.vm.guest:SHUTDOWN_LIMIT", 120.0),),
    ),
    Wait(
        "the kernel to end a QEMU that is killed",
        "10 s",
        _END,
        (
            "qemu.vm.process:QemuProcess.kill",
            "qemu.vm.running:RunningQemu._open_another",
            "qemu.vm.running:RunningQemu._open_session",
            "qemu.vm.process:QemuProcess.wait",
            "qemu.vm.process:QemuProcess.ended",
            "qemu.vm.process:QemuProcess.end",
            "qemu.vm.process:QemuProcess.start",
        ),
        ("qemu/vm/test_end.py::test_a_dead_machine_can_be_deleted",),
        (("qemu.vm.process:_KILL_LIMIT", 10.0),),
    ),
    Wait(
        "a program beside QEMU to end, before it is killed",
        "5 s",
        "its end",
        ("qemu.vm.programs:_end",),
        ("qemu/vm/test_programs.py::test_program_that_was_left_alone_ends_at_the_next_start",),
        (("qemu.vm.programs:_END_LIMIT", 5.0),),
    ),
    Wait(
        "an answer of QEMU (QMP)",
        "`timeout`, 30 s by default; also in exit handlers",
        _END,
        ("qemu.vm.qmp:LoopThread.run", "qemu.vm.qmp:LoopThread.end_sessions.end_sessions"),
        (
            "qemu/vm/test_handles.py::test_a_program_that_holds_the_socket_is_named",
            "qemu/host/test_exit_handlers.py::test_exit_handlers_that_were_there_before_the_import",
        ),
        (("qemu.vm.running:ANSWER_LIMIT", 30.0), ("qemu.vm.running:_GREETING_LIMIT", 30.0)),
    ),
    Wait(
        "an event of QEMU: a state that is written, merged layers, a copy that is restored",
        "300 s and 30 s, 600 s, 60 s",
        _END,
        (
            "qemu.vm.running:RunningQemu.wait_for_event",
            "qemu.vm.livedisk:merge_layers",
            "qemu.saved.restoring:prepared_restore.load_state",
            "qemu.saved.devicestate:send_state",
            "qemu.saved.devicestate:_wait_until_settled",
            "qemu.saved.devicestate:wait_for_state",
            "qemu.saved.capture:_ByTwin.read_state",
        ),
        (
            "qemu/saved/test_checkpoint.py::test_machine_that_ends_while_it_is_saved_is_told_of",
            "qemu/saved/test_rollback.py::test_damaged_one_is_refused",
        ),
        (
            ("qemu.saved.devicestate:_LIMIT_SECONDS", 300.0),
            ("qemu.saved.devicestate:_SETTLE_LIMIT", 30.0),
            ("qemu.vm.livedisk:_MERGE_LIMIT", 600.0),
            ("qemu.saved.restoring:_RESTORE_LIMIT", 60.0),
        ),
    ),
    Wait(
        "a guest that is paused to be saved",
        "60 s and 10 s for each GiB of memory, then it is resumed unsaved",
        "QEMU's end, an error",
        ("qemu.saved.checkpoint:measure_pause", "qemu.saved.capture:InPlace.prepare"),
        ("qemu/saved/test_checkpoint.py::test_guest_goes_on_when_it_stood_still_for_too_long",),
        (
            ("qemu.saved.checkpoint:PAUSE_LIMIT", 60.0),
            ("qemu.saved.checkpoint:_PAUSE_LIMIT_OF_GIB", 10.0),
        ),
    ),
    Wait(
        "a guest to open its seed, where a starting point is made",
        "180 s with KVM, 600 s in emulation",
        f"{_END}, a dead end of the boot, a boot that is past it",
        (
            "qemu.launching.startingpoint:wait_for_seed",
            "qemu.launching.startingpoint:_measure_rtc_lag",
        ),
        (
            "qemu/launching/test_starting_points.py::test_guest_that_never_opens_its_seed_is_waited_for_once",
            "qemu/launching/test_starting_points.py::test_guest_whose_boot_fails_is_tried_again_at_once",
            "qemu/launching/test_fast_boot.py::test_guest_that_dies_before_its_seed_boots_ordinarily",
        ),
        (("qemu.launching.startingpoint:_RTC_LIMIT", 5.0),),
    ),
    Wait(
        "a guest to give a network interface back",
        "60 s",
        _END,
        ("qemu.vm.hotplug:_pull_out",),
        ("guest/test_life.py::test_an_interface_is_plugged_in_and_pulled_out",),
        (("qemu.vm.hotplug:_UNPLUG_LIMIT", 60.0),),
    ),
    Wait(
        "a port that another program holds for a moment",
        "1 s",
        "the port, free again",
        ("qemu.vm.process:retry_taken_ports",),
        ("qemu/vm/test_handles.py::test_a_port_that_is_busy_for_a_moment_does_not_fail_a_start",),
        (("qemu.vm.process:_PORT_PATIENCE", 1.0),),
    ),
    Wait(
        "work that Ctrl-C does not cut off (a start, a save)",
        "that of the work",
        "its end",
        ("_base.tools:uninterrupted", "_base.tools:uninterrupted.run"),
        (
            "unit/qemu/vm/test_uninterrupted.py::test_work_that_is_interrupted_comes_to_its_end_and_is_undone",
        ),
    ),
    Wait(
        "copies that are started at once (`fork()`)",
        "that of each",
        "their end",
        ("qemu.launching.launcher:Launcher.fork",),
        ("qemu/launching/test_copies.py::test_fork_that_fails_leaves_no_copy",),
    ),
    Wait(
        "a look at which accelerator works, and at QEMU's version and options",
        "2.5 s (30 s more in a queue for a processor), 10 s, 30 s",
        "its end",
        (
            "qemu.host.accelerator:try_accelerator",
            "qemu.host.accelerator:_communicate",
            "qemu.host.accelerator:_query",
            "cli.hostfacts:_ask_version",
        ),
        ("qemu/host/test_accelerator.py::test_a_qemu_that_hangs_is_refused_this_time",),
        (
            ("qemu.host.accelerator:WALL_LIMIT_SECONDS", 2.5),
            ("qemu.host.accelerator:QUEUE_LIMIT_SECONDS", 30.0),
            ("qemu.host.accelerator:_LIMIT_SECONDS", 30),
            ("cli.hostfacts:_VERSION_LIMIT", 10.0),
        ),
    ),
    Wait(
        "an SSH agent",
        "5 s to list its keys, 30 s to sign",
        "its end",
        ("guest.access.loginkey:_receive",),
        ("unit/guest/access/test_login_keys.py::test_agent_is_asked_before_it_is_believed",),
        (("guest.access.loginkey:_LIST_LIMIT", 5.0), ("guest.access.loginkey:_SIGN_LIMIT", 30.0)),
    ),
    Wait(
        "bytes of an image server",
        "30 s without any; five attempts",
        "more bytes than the catalog names",
        ("images.download:_try_again",),
        (
            "unit/images/test_download.py::test_server_that_stalls_is_told",
            "unit/images/test_download.py::test_file_that_always_ends_early_is_told",
        ),
        (("images.download:LIMITS.timeout", 30.0),),
    ),
    Wait(
        "programs of the host (`qemu-img`, `gpgv`, `mmdebstrap` …)",
        "none; 10 s to end when they are asked to",
        "Ctrl-C",
        ("_base.tools:_ended", "_base.tools:run_tool", "util:subp"),
        ("unit/base/test_tool_streaming.py::test_the_program_ends_with_whatever_ends_the_call",),
        (("_base.tools:_GRACE_SECONDS", 10.0),),
    ),
    Wait(
        "locks: a machine's power, ports, layers, an image that another makes or fetches",
        _OTHER,
        "the other's end, a kill too",
        (
            "_base.locks:_Lock._lock",
            "images.build:build_image",
            "images.releases:fetch_image",
            "qemu.launching.warmcache:WarmCache.making",
            "qemu.state.rundir:RunDirectory.lock",
            "qemu.host.resources:PortRegistry._lock",
            "qemu.vm.helper:FixUps.fix_up",
        ),
        (
            "unit/images/test_build.py::test_who_comes_second_waits_says_so_and_uses_what_was_built",
            "qemu/launching/test_warm.py::test_others_wait_while_one_is_made",
        ),
    ),
    Wait(
        "another who deletes or replaces an image",
        "10 s; then it is named as the user of the image",
        "its end, a kill too",
        ("images.uses:_exclude",),
        (
            "unit/images/test_uses.py::test_who_removes_a_file_that_another_removes_waits",
            "unit/images/test_uses.py::test_removal_that_does_not_end_is_not_waited_for_without_end",
        ),
        (("images.uses:REMOVAL_LIMIT", 10.0),),
    ),
    Wait(
        "a part of the budget of machines",
        "3600 s",
        "a part that is given back, the end of a process that had one",
        (
            "qemu.host.budget:Budget._wait",
            "qemu.host.budget:Budget._waiting_in_line",
            "qemu.host.budget:Budget.locked",
            "qemu.host.budget:_Held.__init__",
        ),
        (
            "unit/qemu/host/test_budget.py::test_waiting_has_an_end_that_says_who_has_it",
            "unit/qemu/host/test_budget.py::test_process_that_is_killed_gives_back",
            "unit/qemu/host/test_budget.py::test_spare_of_another_process_is_given_back_to_who_waits",
        ),
        (("qemu.host.budget:_LIMIT", 3600.0),),
    ),
    Wait(
        "the end of a boot, by a thread, so that the next machine may boot (`wait_for_room`)",
        "the machine's `ready_timeout`",
        "cloud-init's end, QEMU's end, a long pause, a dead end, `delete()`; " + _SETTLED,
        ("qemu.launching.admission:_follow_boot",),
        (
            "unit/qemu/launching/test_following_boots.py::test_end_of_cloud_init_ends_the_boot",
            "unit/qemu/launching/test_following_boots.py::test_boot_that_takes_too_long_is_said",
            "qemu/launching/test_admission.py::test_second_machine_starts_when_the_first_is_deleted",
            "qemu/launching/test_admission.py::test_second_machine_starts_when_the_qemu_of_the_first_ends",
        ),
    ),
    Wait(
        "a machine that was started ahead to be ready, or ended",
        "those of its launch and its `wait()`",
        "its end, whatever its reason: then another one is started",
        (
            "qemu.ahead:MachineAhead.start",
            "qemu.ahead:MachineAhead.take",
            "qemu.ahead:MachineAhead.drop",
            "qemu.ahead:launching.begin",
            "qemu.ahead:Pool._launch_now",
        ),
        (
            "unit/qemu/test_ahead.py::test_machine_that_is_being_started_is_dropped",
            "unit/qemu/test_ahead.py::test_machine_that_failed_is_not_taken",
        ),
    ),
    Wait(
        "the end of a program, by the process that watches for it",
        "none",
        "the program's end",
        ("qemu.host.guardian_program:main", "qemu.host.guardian_program:wait_for_end"),
        ("qemu/host/test_orphans.py::test_watcher_ends_with_its_program",),
    ),
    Wait(
        "the kernel's list of connections",
        "1 s",
        "its end",
        ("qemu.vm.sockets:_peers",),
        ("qemu/vm/test_handles.py::test_a_program_that_holds_the_socket_is_named",),
    ),
)

_BLOCKING = {
    "accept", "communicate", "create_connection", "exclusive_lock", "flock", "poll", "recv",
    "result", "select", "sleep", "wait", "wait_for", "wait_for_end", "wait_for_event",
    "wait_for_state",
}  # fmt: skip
_NO_THREADS = ("shlex", "os.path", "os.pathsep", "_ID_SEPARATOR", "response.request.url")


def _waits_in(source: Path) -> Iterator[str]:
    """Find the functions of a module that call what may block."""
    module = ".".join(source.relative_to(SOURCE).with_suffix("").parts)

    def visit(node: ast.AST, inside: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = (*inside, node.name)
        if isinstance(node, ast.Call) and _may_block(node):
            yield f"{module}:{'.'.join(inside)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(source.read_text(encoding="utf-8")), ())


def _may_block(call: ast.Call) -> bool:
    text = ast.unparse(call)
    if "LOCK_NB" in text or "LOCK_UN" in text:
        return False
    if not isinstance(call.func, ast.Attribute):
        return getattr(call.func, "id", "") in _BLOCKING
    owner = ast.unparse(call.func.value)
    if call.func.attr == "join":
        return not isinstance(call.func.value, ast.Constant) and owner not in _NO_THREADS
    return call.func.attr in _BLOCKING or ast.unparse(call.func) == "subprocess.run"


def _sources() -> list[Path]:
    # What runs in guests waits there.
    return [path for path in SOURCE.rglob("*.py") if not path.stem.endswith("_in_guest")]


def test_every_wait_has_its_row() -> None:
    known = {place for wait in WAITS for place in wait.places}
    found = {place for source in _sources() for place in _waits_in(source)}
    assert (found - known, known - found) == (set(), set()), "(without a row, in no place any more)"


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.what[:40])
def test_row_says_what_the_code_and_the_document_say(wait: Wait) -> None:
    for name, seconds in wait.seconds:
        module, _, constant = name.partition(":")
        limit = operator.attrgetter(constant)(importlib.import_module(f"pycloudlib.{module}"))
        assert limit == seconds, name
    row = f"| {wait.what} | {wait.limit} | {wait.early} |"
    assert row in TABLE.read_text(encoding="utf-8").splitlines(), row


@pytest.mark.parametrize(
    "test", sorted({test for wait in WAITS for test in wait.shown}), ids=lambda test: test
)
def test_row_is_shown_by_a_test_that_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_document_has_no_other_row() -> None:
    text = TABLE.read_text(encoding="utf-8").partition("## Waits")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(WAITS) + 1
