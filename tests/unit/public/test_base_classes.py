"""The contract with clients' own subclasses, tried with the smallest ones that can be written."""

from __future__ import annotations

import io
import logging
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib.cloud import BaseCloud
from pycloudlib.errors import CleanupError, InvalidTagNameError, PycloudlibTimeoutError
from pycloudlib.guest.access import ssh
from pycloudlib.instance import BaseInstance
from pycloudlib.key import KeyPair, generate_ed25519
from pycloudlib.result import Result

CLOUD_INIT_FINISHED = 'finished\n{"v1": {"datasource": "DataSourceNone", "stage": null}}'
CLOUD_INIT_FAILED = 'finished\n{"v1": {"datasource": "x", "init": {"errors": ["no such module"]}}}'


class Instance(BaseInstance):
    """All that a subclass has to have, and nothing else."""

    def __init__(self, key_pair: KeyPair | None = None) -> None:
        super().__init__(key_pair or KeyPair(None, name="none"))
        self.deletions: list[bool] = []
        self.delete_errors: list[Exception] = []
        self.restarts = 0

    @property
    def id(self) -> str:
        return "minimal-1"

    @property
    def name(self) -> str:
        return "minimal"

    @property
    def ip(self) -> str:
        return "127.0.0.1"

    def delete(self, wait: bool = True) -> list[Exception]:
        self.deletions.append(wait)
        return self.delete_errors

    def _do_restart(self, **kwargs: Any) -> None:
        self.restarts += 1

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        raise NotImplementedError

    def start(self, wait: bool = True) -> None:
        raise NotImplementedError

    def wait_for_delete(self, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_stop(self, **kwargs: Any) -> None:
        raise NotImplementedError


class Cloud(BaseCloud):
    """All that a subclass has to have, and nothing else."""

    _type = "minimal"

    def __init__(self, tag: str = "minimal", **kwargs: Any) -> None:
        super().__init__(tag, **{"config_file": io.StringIO(""), **kwargs})
        self.deleted_images: list[str] = []

    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        if image_id == "stuck":
            raise OSError("the image is stuck")
        self.deleted_images.append(image_id)

    def released_image(self, release: str, **kwargs: Any) -> str:
        raise NotImplementedError

    def daily_image(self, release: str, **kwargs: Any) -> str:
        raise NotImplementedError

    def image_serial(self, image_id: str) -> str:
        raise NotImplementedError

    def get_instance(self, instance_id: str, username: str | None = None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def launch(
        self,
        image_id: str,
        instance_type: str | None = None,
        user_data: str | bytes | None = None,
        **kwargs: Any,
    ) -> Any:
        instance = Instance()
        self.created_instances.append(instance)
        return instance

    def snapshot(self, instance: Any, clean: bool = True, **kwargs: Any) -> str:
        raise NotImplementedError


class Guest(paramiko.ServerInterface):
    """A server that executes on this host whatever it is asked to; one for each connection."""

    def __init__(self, allowed: paramiko.PKey) -> None:
        self._allowed = allowed

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = key.get_base64() == self._allowed.get_base64()
        return paramiko.common.AUTH_SUCCESSFUL if known else paramiko.common.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_pty_request(self, *args: Any) -> bool:
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._execute, args=(channel, command), daemon=True).start()
        return True

    def _execute(self, channel: paramiko.Channel, command: bytes) -> None:
        stdin = b""
        while chunk := channel.recv(1 << 16):
            stdin += chunk
        done = subprocess.run(
            ["sh", "-c", command.decode()], input=stdin, capture_output=True, check=False
        )
        channel.sendall(done.stdout)
        channel.sendall_stderr(done.stderr)
        channel.send_exit_status(done.returncode)
        channel.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    directory = tmp_path_factory.mktemp("keys")
    private, public = generate_ed25519(comment="test")
    (directory / "key").write_text(private)
    (directory / "key.pub").write_text(public + "\n")
    return KeyPair(directory / "key.pub", name="test")


@pytest.fixture(scope="module")
def guest_port(keys: KeyPair) -> Iterator[int]:
    key = paramiko.Ed25519Key.from_private_key_file(str(keys.private_key_path))
    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[paramiko.Transport] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.set_log_channel("tests.guest")
            transport.add_server_key(key)
            transports.append(transport)
            # Those who only look for a banner leave during the negotiation.
            transport.start_server(threading.Event(), Guest(key))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for transport in transports:
        transport.close()
    thread.join(10)


@pytest.fixture
def instance(keys: KeyPair, guest_port: int) -> Iterator[Instance]:
    instance = Instance(keys)
    instance.port = str(guest_port)
    yield instance
    instance._forget_client()


def test_small_requests_are_not_held_back(instance: Instance, guest_port: int) -> None:
    with ssh.open_with_banner("127.0.0.1", guest_port, 10) as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connection_uses_the_cipher_that_is_quickest(instance: Instance) -> None:
    with instance._ssh_connect() as client:
        transport = client.get_transport()
        assert transport is not None
        assert transport.local_cipher == "aes128-gcm@openssh.com"


def test_ciphers_are_all_offered_in_their_order_but_for_the_first() -> None:
    assert ssh.order_ciphers(("b", "aes128-gcm@openssh.com", "a")) == (
        "aes128-gcm@openssh.com",
        "b",
        "a",
    )
    assert ssh.order_ciphers(("b", "a")) == ("b", "a")


def test_string_is_run_by_a_shell(instance: Instance) -> None:
    assert instance.execute("a=1; echo $((a + 1)) | cat") == "2"


def test_list_is_run_as_it_is(instance: Instance) -> None:
    assert instance.execute(["printf", "%s|", "$HOME", "two words", "'"]) == "$HOME|two words|'|"


def test_output_is_stripped_on_the_right_alone(instance: Instance) -> None:
    assert instance.execute("printf '  a \\n\\n'") == "  a"


def test_failure_does_not_raise(instance: Instance) -> None:
    result = instance.execute("echo out; echo err >&2; exit 7")

    assert (result, result.stderr, result.return_code) == ("out", "err", 7)
    assert result.failed


@pytest.mark.parametrize("stdin", ["grüß\n", "grüß\n".encode()])
def test_standard_input_may_be_text_or_bytes(stdin: str | bytes, instance: Instance) -> None:
    assert instance.execute("cat", stdin=stdin) == "grüß"


def test_large_output_on_both_streams_arrives_whole(instance: Instance) -> None:
    size = 3 << 20
    result = instance.execute(f"head -c {size} /dev/zero | tr '\\0' x | tee /dev/stderr")

    assert (len(result), len(result.stderr)) == (size, size)


@pytest.mark.parametrize("wrong", [None, 5, [], ["a", 5], b"bytes"])
def test_command_of_a_wrong_type_is_refused(wrong: Any, instance: Instance) -> None:
    with pytest.raises((TypeError, ValueError), match="command"):
        instance.execute(wrong)


@pytest.mark.parametrize("command", ["a\0b", ["echo", "a\0b"]])
def test_command_with_a_nul_byte_is_refused_at_once(command: Any) -> None:
    with pytest.raises(ValueError, match=r"command has a NUL byte in 'a.x00b'"):
        Instance().execute(command)


def test_what_is_not_unicode_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="command has"):
        Instance().execute("\ud800")
    with pytest.raises(ValueError, match="stdin has"):
        Instance().execute("cat", stdin="\ud800")


@pytest.mark.parametrize("wrong", [5, ["a"], 1.5, object()])
def test_input_of_a_wrong_type_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="stdin must be"):
        Instance().execute("cat", stdin=wrong)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), True, "5"])
def test_wrong_timeout_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout is"):
        Instance().execute("true", timeout=wrong)


def test_timeout_without_end_is_none(instance: Instance) -> None:
    assert instance.execute("echo fine", timeout=float("inf")) == "fine"


def test_unknown_keywords_are_accepted(instance: Instance) -> None:
    assert instance.execute("echo fine", some_option=True) == "fine"


def test_script_reaches_the_guest_untouched(instance: Instance) -> None:
    script = "#!/bin/sh\nprintf '%s' \"it's \\$5\"; exit 3\n"

    result = instance.run_script(script)

    assert (result, result.return_code) == ("it's $5", 3)


def test_connection_is_one_of_paramikos(instance: Instance) -> None:
    client = instance._ssh_connect()

    with client:
        assert isinstance(client, paramiko.SSHClient)
        _, stdout, _ = client.exec_command("echo connected")
        stdout.channel.shutdown_write()
        assert stdout.read() == b"connected\n"


def test_unreachable_machine_is_an_ssh_error() -> None:
    instance = Instance()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        instance.port = str(unused.getsockname()[1])

        with pytest.raises(paramiko.SSHException):
            instance.execute("true")


def test_refused_key_is_an_ssh_error(instance: Instance, tmp_path: Path) -> None:
    private, public = generate_ed25519(comment="stranger")
    (tmp_path / "other").write_text(private)
    (tmp_path / "other.pub").write_text(public)
    instance.key_pair = KeyPair(tmp_path / "other.pub", name="other")

    with pytest.raises(paramiko.SSHException):
        instance.execute("true")


@pytest.fixture
def strange_key(instance: Instance, tmp_path: Path) -> None:
    """Let the machine be logged in to with a key that it does not know."""
    private, public = generate_ed25519(comment="stranger")
    (tmp_path / "other").write_text(private)
    (tmp_path / "other.pub").write_text(public)
    instance.key_pair = KeyPair(tmp_path / "other.pub", name="other")


@pytest.mark.parametrize(
    ("said", "final"),
    [
        ("Your account has expired;\nplease contact your administrator", True),
        ("System is going down. Unprivileged users are not permitted to log in anymore.", False),
    ],
)
def test_what_the_server_says_to_a_refused_user_is_told(
    said: str,
    final: bool,
    instance: Instance,
    strange_key: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Guest, "get_banner", lambda _: (said, "en-US"))

    with pytest.raises(paramiko.AuthenticationException) as caught:
        instance.execute("true")

    assert f"refused: Authentication failed.; the server says: {' '.join(said.split())}" in str(
        caught.value
    )
    assert ssh.is_refusal(caught.value) is final


def test_server_that_takes_passwords_alone_refuses_the_key(
    instance: Instance, strange_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guest, "get_allowed_auths", lambda _self, _user: "password")

    with pytest.raises(paramiko.AuthenticationException, match="refused: Bad auth") as caught:
        instance.execute("true")

    assert ssh.is_refusal(caught.value)


def test_machine_that_never_answers_is_a_timeout(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        instance.port = str(unused.getsockname()[1])

        with pytest.raises(PycloudlibTimeoutError, match="minimal"):
            instance.wait(ready_timeout=0.005)


@pytest.mark.parametrize("wrong", [0, -1, "5", float("nan"), True])
def test_wrong_ready_timeout_is_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="ready_timeout"):
        Instance().wait(ready_timeout=wrong)


def test_ready_is_waited_for_in_order() -> None:
    steps: list[str] = []

    class Old(Instance):
        def _wait_for_instance_start(self, **kwargs: Any) -> None:
            steps.append("start")

        def _wait_for_execute(self) -> None:  # type: ignore[override]
            steps.append("execute")

        def _wait_for_cloudinit(self) -> None:  # type: ignore[override]
            steps.append("cloud-init")

    Old().wait()

    assert steps == ["start", "execute", "cloud-init"]


def test_overridden_cloud_init_wait_is_used_after_a_restart() -> None:
    steps: list[str] = []

    class Old(Instance):
        def execute(self, command: Any, *args: Any, **kwargs: Any) -> Result:
            return Result("boot-1")

        def _wait_for_execute(self, old_boot_id: str | None = None) -> None:  # type: ignore[override]
            steps.append(f"execute after {old_boot_id}")

        def _wait_for_cloudinit(self) -> None:  # type: ignore[override]
            steps.append("cloud-init")

    machine = Old()
    machine.restart()

    assert machine.restarts == 1
    assert steps == ["execute after boot-1", "cloud-init"]


def test_restart_without_waiting_only_begins() -> None:
    machine = Instance()

    machine.restart(wait=False)

    assert machine.restarts == 1


class OldTransport(Instance):
    """Overrides `_ssh` as it was before it took anything but standard input."""

    answers = CLOUD_INIT_FINISHED

    def __init__(self, key_pair: KeyPair | None = None) -> None:
        super().__init__(key_pair)
        self.commands: list[Sequence[str]] = []

    def _ssh(self, command: Sequence[str], stdin: Any = None) -> Result:  # type: ignore[override]
        self.commands.append(command)
        if "boot_id" in " ".join(command):
            return Result("boot-1")
        return Result(self.answers)


@pytest.fixture
def old_transport(guest_port: int) -> OldTransport:
    instance = OldTransport()
    instance.port = str(guest_port)
    return instance


def test_command_goes_through_an_overridden_transport(old_transport: OldTransport) -> None:
    assert old_transport.execute(["anything"]) == CLOUD_INIT_FINISHED
    assert [list(command) for command in old_transport.commands] == [["anything"]]


def test_ready_is_found_out_through_an_overridden_transport(old_transport: OldTransport) -> None:
    old_transport.wait(ready_timeout=0.2)

    assert len(old_transport.commands) >= 2


def test_failure_of_cloud_init_is_logged_and_does_not_raise(
    old_transport: OldTransport, caplog: pytest.LogCaptureFixture
) -> None:
    old_transport.answers = CLOUD_INIT_FAILED

    with caplog.at_level(logging.WARNING):
        old_transport.wait(ready_timeout=0.2)

    assert "no such module" in caplog.text


def test_lost_connection_while_cloud_init_runs_is_waited_out() -> None:
    class Rebooting(Instance):
        asked = 0

        def _wait_for_execute(self, old_boot_id: str | None = None) -> None:  # type: ignore[override]
            pass

        def _ssh(  # type: ignore[override]
            self, command: Sequence[str], stdin: Any = None, **kwargs: Any
        ) -> Result:
            self.asked += 1
            if self.asked == 1:
                raise paramiko.SSHException("the guest rebooted")
            return Result(CLOUD_INIT_FINISHED)

    machine = Rebooting()
    machine.wait(ready_timeout=0.2)

    assert machine.asked == 2


def test_everything_goes_through_an_overridden_execute() -> None:
    asked: list[Any] = []

    class Recording(Instance):
        def execute(
            self, command: Any, stdin: Any = None, description: Any = None, **kwargs: Any
        ) -> Result:
            asked.append((command, stdin))
            return Result(" boot-2 \n")

    machine = Recording()

    assert machine.get_boot_id() == "boot-2"
    machine.run_script("echo hello")
    machine.install(["some-package"])
    machine.update()
    machine.clean()
    assert len(asked) == 5
    assert "some-package" in str(asked[2])


def test_overridden_execute_may_call_the_original(instance: Instance) -> None:
    class Wrapping(Instance):
        def execute(self, command: Any, **kwargs: Any) -> Result:  # type: ignore[override]
            return super().execute(command, **kwargs)

    wrapping = Wrapping(instance.key_pair)
    wrapping.port = instance.port

    assert wrapping.execute("echo through") == "through"
    wrapping._forget_client()


def test_overridden_connection_is_used(instance: Instance) -> None:
    connections: list[paramiko.SSHClient] = []

    class Connecting(Instance):
        def _ssh_connect(self) -> paramiko.SSHClient:
            connections.append(instance._ssh_connect())
            return connections[-1]

    connecting = Connecting()

    assert connecting.execute("echo one") == "one"
    assert connecting.execute("echo two") == "two"
    assert connections
    connecting._forget_client()


def test_leaving_an_instance_deletes_it() -> None:
    with Instance() as machine:
        assert not machine.deletions

    assert len(machine.deletions) == 1


def test_leaving_an_instance_that_cannot_be_deleted_tells_why() -> None:
    machine = Instance()
    machine.delete_errors = [OSError("still there")]

    with pytest.raises(CleanupError, match="still there"), machine:
        pass


def test_cloud_keeps_its_tag_and_adds_the_time() -> None:
    assert Cloud("mine", timestamp_suffix=False).tag == "mine"
    assert Cloud("mine").tag.startswith("mine-")


def test_cloud_checks_its_tag() -> None:
    with pytest.raises(InvalidTagNameError):
        Cloud("Not Good")


def test_cloud_reads_its_own_section() -> None:
    config_file = io.StringIO("[minimal]\nanswer = 42\n[qemu]\nanswer = 0\n")

    assert Cloud(config_file=config_file).config["answer"] == 42


def test_leaving_a_cloud_deletes_what_it_made() -> None:
    with Cloud() as cloud:
        instance = cloud.launch("image")
        cloud.created_images.append("snapshot")

    assert instance.deletions
    assert cloud.deleted_images == ["snapshot"]


def test_cleaning_tries_everything_and_gives_every_error() -> None:
    cloud = Cloud()
    cloud.launch("image").delete_errors = [OSError("one")]
    second = cloud.launch("image")
    cloud.created_images += ["stuck", "loose"]

    errors = cloud.clean()

    assert {str(error) for error in errors} == {"one", "the image is stuck"}
    assert second.deletions
    assert cloud.deleted_images == ["loose"]


def test_cleaning_goes_on_when_an_instance_raises() -> None:
    class Raising(Instance):
        def delete(self, wait: bool = True) -> list[Exception]:
            raise OSError("no connection")

    cloud = Cloud()
    cloud.created_instances.append(Raising())
    second = cloud.launch("image")

    errors = cloud.clean()

    assert [str(error) for error in errors] == ["no connection"]
    assert second.deletions


def test_leaving_a_cloud_that_cannot_be_cleaned_tells_why() -> None:
    with pytest.raises(CleanupError, match="stuck"), Cloud() as cloud:
        cloud.created_images.append("stuck")


def test_error_inside_the_block_is_not_hidden() -> None:
    cloud = Cloud()
    cloud.created_images.append("stuck")

    with pytest.raises((CleanupError, RuntimeError)) as caught, cloud:
        raise RuntimeError("the test failed")

    seen = [caught.value, caught.value.__context__, caught.value.__cause__]
    assert any(isinstance(error, RuntimeError) for error in seen)


WITH_SECTION = "[minimal]\nregion = 'here'\n"


@pytest.mark.parametrize(
    ("text", "required_values"),
    [
        ("", None),
        ("", []),
        ("", ["given", 5]),
        (WITH_SECTION, None),
        (WITH_SECTION, ["given"]),
        (WITH_SECTION, [None]),
        (WITH_SECTION, ["given", None]),
    ],
)
def test_section_is_read_if_it_is_there(text: str, required_values: list[Any] | None) -> None:
    cloud = Cloud(config_file=io.StringIO(text), required_values=required_values)

    assert cloud.config == ({"region": "here"} if text else {})


@pytest.mark.parametrize("required_values", [[None], ["given", None]])
def test_section_has_to_be_there_for_what_is_not_given(required_values: list[Any]) -> None:
    with pytest.raises(KeyError, match=r"'minimal' is not in pycloudlib\.toml"):
        Cloud(config_file=io.StringIO(""), required_values=required_values)


def test_required_values_may_be_given_by_position() -> None:
    class Positional(Cloud):
        def __init__(self) -> None:
            BaseCloud.__init__(self, "tag", False, io.StringIO(WITH_SECTION), [None])

    assert Positional().config == {"region": "here"}


def test_a_subclass_may_have_its_own_way_to_its_configuration(tmp_path: Path) -> None:
    private, public = generate_ed25519("mine")
    (tmp_path / "mine").write_text(private)
    (tmp_path / "mine.pub").write_text(public)

    class Configured(Cloud):
        def _check_and_set_config(self, config_file: object, required_values: object) -> None:
            self.config = {"public_key_path": str(tmp_path / "mine.pub")}

    cloud = Configured(required_values=[None])

    assert cloud.key_pair.public_key_path == str(tmp_path / "mine.pub")


def test_a_program_may_choose_the_key_in_the_clouds_stead(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = KeyPair("/keys/chosen.pub")
    monkeypatch.setattr(BaseCloud, "_get_ssh_keys", lambda *_args, **_kwargs: chosen)

    assert Cloud().key_pair is chosen


@pytest.mark.parametrize(
    ("command", "shown"),
    [("echo 'a b'", "echo 'a b'"), (["echo", "a b"], "echo 'a b'"), (("true",), "true")],
)
def test_what_is_executed_is_logged(
    command: Sequence[str], shown: str, instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        instance.execute(command, description="for a reason")

    messages = [
        record.getMessage() for record in caplog.records if record.name[:10] == "pycloudlib"
    ]
    assert messages == [f"{instance.name}: for a reason", f"executing: {shown}"]


def test_what_is_not_to_be_logged_is_not(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert instance.execute("echo secret", no_log=True) == "secret"

    assert not [record for record in caplog.records if "secret" in record.getMessage()]


def test_what_a_wait_asks_is_not_logged_as_executed(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(PycloudlibTimeoutError):
        instance._wait_for_execute(old_boot_id=instance.get_boot_id(), timeout=1)

    messages = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("executing: ") for message in messages) == 1


def test_a_wait_takes_as_long_as_its_instance_says(instance: Instance) -> None:
    assert instance.ready_timeout == 20
    instance.ready_timeout = 0.001
    same = instance.get_boot_id()

    with pytest.raises(PycloudlibTimeoutError, match=r"within 0 s"):
        instance.wait_for_restart(same)
    with pytest.raises(PycloudlibTimeoutError, match=r"within 0 s"):
        instance._wait_for_execute(old_boot_id=same)


@pytest.mark.parametrize("minutes", [0, -1, "5", True])
def test_a_time_that_cannot_be_waited_is_refused(minutes: Any, instance: Instance) -> None:
    with pytest.raises(ValueError, match=f"ready_timeout is {minutes!r}"):
        instance.ready_timeout = minutes
    assert instance.ready_timeout == 20


def test_what_a_cloud_cannot_tell_says_so(instance: Instance) -> None:
    with pytest.raises(NotImplementedError, match="Instance tells no private address"):
        _ = instance.private_ip
    with pytest.raises(NotImplementedError, match="Instance tells no status"):
        instance.get_status()
    with pytest.raises(NotImplementedError, match="Cloud finds no images by name"):
        Cloud().get_image_id_from_name("noble")


def test_an_instance_whose_id_is_a_method_is_shown() -> None:
    class Own(Instance):
        def id(self) -> str:  # type: ignore[override]
            return "own-1"

    assert repr(Own()) == "Own(own-1)"
    assert repr(Instance()) == "Instance(minimal-1)"


def test_connections_are_closed_by_whoever_is_done_with_an_instance(instance: Instance) -> None:
    assert instance.execute("echo once") == "once"
    assert instance._is_connected()

    instance.__del__()
    instance.__del__()

    assert not instance._is_connected()
    assert instance.execute("echo again") == "again"
