# SPDX-License-Identifier: Apache-2.0
"""The whole job at laptop size: both training stages, evaluation and a saved model, on handwritten digits."""
