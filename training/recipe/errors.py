# SPDX-License-Identifier: Apache-2.0
"""What ends a run on a mixture, in a module that is loaded without the libraries that read one."""


class TooManyBadSamplesError(RuntimeError):
    """More samples than allowed could not be used."""
