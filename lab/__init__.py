# SPDX-License-Identifier: Apache-2.0
"""Compares projectors between the same vision tower and language model."""
