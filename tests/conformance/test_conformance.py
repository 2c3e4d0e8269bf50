# SPDX-License-Identifier: Apache-2.0
"""`HONEYBEE_TRANSFORMERS_CHECKOUT` names a checkout of transformers whose tests are run on our model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deliberate import reason
from run import run, unusable

CHECKOUT = os.environ.get("HONEYBEE_TRANSFORMERS_CHECKOUT", "")
PROJECTORS = ("Linear", "Mlp", "Resampler", "CAbstractor", "DAbstractor")


@pytest.mark.parametrize("projector", PROJECTORS)
def test_transformers_own_tests(projector):
    if why := unusable(CHECKOUT):
        pytest.skip(f"HONEYBEE_TRANSFORMERS_CHECKOUT: {why}")
    (tests,) = run(CHECKOUT, "-k", f"{projector}Test").values()
    failed = {test: result for test, result in tests.items() if result not in ("passed", "skipped", "xfailed")}
    assert {test: result for test, result in failed.items() if reason(test, result) is None} == {}
    assert len(failed) <= 35 and sum(result == "passed" for result in tests.values()) >= 60


def test_a_folder_without_the_tests_is_named(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("run.py")), str(tmp_path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert f"{tmp_path} is no checkout of transformers: it lacks src/transformers/__init__.py" in result.stdout


def test_reasons_are_for_one_failure_of_one_test():
    says = "ValueError: /tmp/x lacks 90 tensors of HoneybeeModel: a, b"
    assert reason("test_correct_missing_keys", says)
    assert reason("test_correct_missing_keys_and_more", says) is None
    assert reason("test_correct_missing_keys", "KeyError: 'x'") is None
