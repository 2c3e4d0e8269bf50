# SPDX-License-Identifier: Apache-2.0
"""A model behind the OpenAI API (`serve.py`) and in a chat page (`chat_demo.py`), both with limits (`limits.py`)."""
