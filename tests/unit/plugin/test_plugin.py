"""The pytest plugin, as far as it goes without a machine."""

from __future__ import annotations

import re

import pytest

from pycloudlib.pytest_plugin.machines import directory_name, name_machine
from pycloudlib.qemu.state.spec import check_name


def test_options_and_marker_are_known(pytester: pytest.Pytester) -> None:
    helped = pytester.runpytest_inprocess("--help").stdout.str()

    for option in ("--vm-image=IMAGE", "--vm-keep", "--vm-artifacts=DIR"):
        assert option in helped
    assert "@pytest.mark.vm(image=" in pytester.runpytest_inprocess("--markers").stdout.str()


def test_fixtures_say_what_they_give(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_inprocess("--fixtures").stdout.str()

    for fixture in ("qemu_cloud", "vm_image", "vm", "vm_factory", "shared_vm", "prepare_vm"):
        (said,) = re.findall(rf"\n{fixture}(?: \[.*\])? -- .*\n +(.*)", listed)
        assert said.startswith("Return ")


def test_tests_without_machines_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test_it(): assert False, 'as ever'")

    result = pytester.runpytest_inprocess()

    result.assert_outcomes(failed=1)
    assert " machine " not in result.stdout.str()


def test_module_that_cannot_be_imported_is_told_as_ever(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import no_such_module")

    result = pytester.runpytest_inprocess()

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1)
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def test_image_is_a_file_where_it_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.path / "of-run.img").write_bytes(b"odd")
    (pytester.path / "of-test.img").write_bytes(b"odd")
    pytester.makepyfile(
        """
        import pytest

        def test_of_run(tmp_path, monkeypatch, vm_factory):
            monkeypatch.chdir(tmp_path)
            with pytest.raises(ValueError, match="of-run.img"):
                vm_factory()

        @pytest.mark.vm(image="of-test.img")
        def test_of_test(tmp_path, monkeypatch, vm_factory):
            monkeypatch.chdir(tmp_path)
            with pytest.raises(ValueError, match="of-test.img"):
                vm_factory()
        """
    )

    result = pytester.runpytest_inprocess("--vm-image=of-run.img")

    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("'noble'", "not 'noble'"),
        ("images='noble'", "takes image, instance_type, user_data, each by its name, not 'images'"),
    ],
)
def test_marker_that_is_wrong_is_told_at_once(
    marker: str, told: str, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.vm({marker})\ndef test_it(vm): pass\n")

    result = pytester.runpytest_inprocess("--vm-image=nowhere.img")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{told}*"])


def test_image_that_is_not_there_is_told(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(vm): pass")

    result = pytester.runpytest_inprocess("--vm-image=nobel")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*There is no image 'nobel'*did you mean 'noble'?*"])


@pytest.mark.parametrize("value", ["many", "0", "-1"])
def test_budget_that_is_wrong_is_told(value: str, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nvm_processors = {value}\n")
    pytester.makepyfile("def test_it(vm): pass")

    result = pytester.runpytest_inprocess()

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*vm_processors is '{value}'*expected a number from 1*"])


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_number_of_machines_ahead_that_is_wrong_is_told(
    value: str, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile("def test_it(vm): pass")

    result = pytester.runpytest_inprocess(f"--vm-ahead={value}")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*--vm-ahead is '{value}'*expected a number*"])


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        ("tests/test_a.py::test_b[c/d]", "tests-test_a.py-test_b-c-d"),
        ("../x.py::test", "x.py-test"),
        ("a" * 400, "a" * 150),
    ],
)
def test_directory_of_artifacts_is_named_after_the_test(nodeid: str, name: str) -> None:
    assert directory_name(nodeid) == name


@pytest.mark.parametrize(
    ("test", "stem"),
    [
        ("test_it", "test-it"),
        ("test_It[a b/c-\u2603]", "test-it-a-b-c"),
        ("[]", "vm"),
        ("a" * 53 + "_b", "a" * 53),
        ("b" * 100, "b" * 54),
    ],
)
def test_machine_is_called_after_its_test(test: str, stem: str) -> None:
    name = name_machine(test)

    assert check_name(name) == name
    assert name.rpartition("-")[0] == stem
    assert name_machine(test) != name


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_number_of_tests_ahead_that_is_wrong_is_told(value: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(vm): pass")

    by_option = pytester.runpytest_inprocess(f"--vm-ahead={value}")
    pytester.makeini(f"[pytest]\nvm_ahead = {value}\n")
    by_file = pytester.runpytest_inprocess()

    by_option.stdout.fnmatch_lines([f"*--vm-ahead is '{value}', expected a number*"])
    by_file.stdout.fnmatch_lines([f"*vm_ahead is '{value}' in *, expected a number*"])
