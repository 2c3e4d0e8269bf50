# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's, and what it needs for several processes, batches of like lengths, and signals."""
