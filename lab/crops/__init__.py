# SPDX-License-Identifier: Apache-2.0
"""Compares crops with squeezed pictures where what is asked about is too small once squeezed."""
