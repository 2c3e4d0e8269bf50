# SPDX-License-Identifier: Apache-2.0
"""The paper's data recipe: from annotation files to a weighted stream of conversations."""
