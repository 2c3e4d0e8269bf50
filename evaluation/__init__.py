# SPDX-License-Identifier: Apache-2.0
"""The paper's benchmarks: readers, generation, the official scorers, judged tasks and a report. Start with run.py."""
