from __future__ import annotations

import copy
import pickle

import pytest

from pycloudlib.result import Result


def test_result_is_its_standard_output() -> None:
    result = Result("some output")

    assert isinstance(result, str)
    assert result == "some output"
    assert result.split() == ["some", "output"]
    assert result.stdout == "some output"


def test_error_output_and_exit_status_have_defaults() -> None:
    result = Result("out")

    assert (result.stderr, result.return_code) == ("", 0)


def test_all_parts_are_told_apart() -> None:
    result = Result("out", "err", 3)

    assert (result.stdout, result.stderr, result.return_code) == ("out", "err", 3)


@pytest.mark.parametrize("output", ["", "out"])
@pytest.mark.parametrize(("return_code", "ok"), [(0, True), (1, False), (255, False), (-1, False)])
def test_truth_is_the_exit_status_and_never_the_output(
    output: str, return_code: int, ok: bool
) -> None:
    result = Result(output, "", return_code)

    assert bool(result) is ok
    assert result.ok is ok
    assert result.failed is not ok


def test_output_can_be_a_key() -> None:
    found: dict[str, str] = {Result("a", "", 1): "found"}

    assert found["a"] == "found"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))]
)
def test_copies_keep_all_parts(duplicate: object) -> None:
    assert callable(duplicate)
    copied = duplicate(Result("out", "err", 3))

    assert (copied, copied.stderr, copied.return_code) == ("out", "err", 3)


def test_representation_is_that_of_the_text() -> None:
    """So that an assert that fails shows it like any other."""
    assert repr(Result("it's\nout", "no such file", 2)) == repr("it's\nout")
