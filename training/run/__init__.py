# SPDX-License-Identifier: Apache-2.0
"""A training run: its settings, what is checked and planned, what it reads and saves."""
