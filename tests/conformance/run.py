# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests, run on a tiny Honeybee with each projector.

    python tests/conformance/run.py /path/to/transformers            # all five projectors
    python tests/conformance/run.py /path/to/transformers -k DAbs    # what follows is for pytest
    python tests/conformance/run.py /path/to/transformers --llava    # llava's own tests, to compare with

The path is a checkout with `src/` and `tests/`, of the installed release or near it; its tests need `parameterized`
and `httpx`. Ends with 1 where a test is not passed that `deliberate.py` does not name.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from deliberate import reason

HERE = Path(__file__).parent
NEEDED = ("src/transformers/__init__.py", "tests/test_modeling_common.py", "tests/generation/test_utils.py")
LIBRARIES = ("parameterized", "httpx")


def unusable(checkout: str) -> str | None:
    """Why tests of this checkout cannot be run; None where they can."""
    if not checkout:
        return "no checkout of transformers was named"
    missing = [name for name in NEEDED if not Path(checkout, name).is_file()]
    if missing:
        return f"{checkout} is no checkout of transformers: it lacks {', '.join(missing)}"
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    return f"transformers' tests need {', '.join(missing)}; pip install {' '.join(missing)}" if missing else None


def run(checkout: str, *arguments: str) -> dict[str, dict[str, str]]:
    """What became of each test, by class and name: "passed", "skipped", "xfailed", or what its failure says."""
    arguments = list(arguments)
    file = str(HERE / "honeybee_classes.py")
    if "--llava" in arguments:
        arguments.remove("--llava")
        arguments += ["-k", "not Integration"]
        file = str(Path(checkout, "tests/models/llava/test_modeling_llava.py"))
    # `tests` is the checkout's package here, and the models are ours.
    path = [str(checkout), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", file, "--noconftest", "-c", os.devnull, "--rootdir", folder]
        command += ["-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore", f"--junitxml={report}", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
        if not report.is_file() or result.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {result.returncode} before it ran a test:\n{result.stdout[-3000:]}")
        return _outcomes(report)


def _outcomes(report: Path) -> dict[str, dict[str, str]]:
    outcomes: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tests = outcomes.setdefault(case.get("classname").split(".")[-1], {})
        result = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                result = child.get("message") or child.tag
            elif child.tag == "skipped":
                result = "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
        # A test has an entry of its own beside those of the subtests that failed.
        if tests.get(case.get("name"), "passed") in ("passed", "skipped"):
            tests[case.get("name")] = result
    return outcomes


def main() -> int:
    if len(sys.argv) < 2 or (why := unusable(sys.argv[1])):
        print(why if len(sys.argv) > 1 else __doc__)
        return 2
    status = 0
    for name, tests in run(*sys.argv[1:]).items():
        counts = {kind: sum(result == kind for result in tests.values()) for kind in ("passed", "skipped", "xfailed")}
        failed = {test: result for test, result in tests.items() if result not in counts}
        print(f"{name}: {len(tests)} tests, {counts}, not passed: {len(failed)}")
        for test, result in failed.items():
            why = reason(test, result)
            status = status if why else 1
            print(f"  {test}: {why or 'UNEXPECTED: ' + result[:200]}")
    return status


if __name__ == "__main__":
    sys.exit(main())
