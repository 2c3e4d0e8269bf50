# SPDX-License-Identifier: Apache-2.0
"""Runs several pushes in one process, since importing takes longer than refusing.

python many_pushes.py CASES.json     # [{"token": ..., "arguments": [...]}]; prints one JSON line a case
"""

import contextlib
import io
import json
import os
import sys

from hub_upload import push

with open(sys.argv[1], encoding="utf-8") as file:
    cases = json.load(file)
said = []
for case in cases:
    os.environ["HF_TOKEN"] = case["token"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            push.main(case["arguments"])
            error = None
        except SystemExit as exit:
            error = str(exit)
    said.append({"error": error, "output": output.getvalue()})
print("\n" + json.dumps(said))
