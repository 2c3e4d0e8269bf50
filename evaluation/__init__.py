# SPDX-License-Identifier: Apache-2.0
"""The paper's benchmarks, one file each in `tasks/`; what asks a model and writes scores and a report. Start with run.py."""
