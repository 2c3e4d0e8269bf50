# SPDX-License-Identifier: Apache-2.0
"""Answers chats with vLLM's `LLM.chat`, in an environment that has vLLM and not this project.

    python vllm_answers.py CHATS.json FOLDER RESULT.json

CHATS.json holds `chats` in OpenAI's form, `engine` (arguments of `LLM`), `sampling` (of `SamplingParams`) and `settings`, the
`mm_processor_kwargs` with which all chats are asked, one after the other. RESULT.json gets of each chat the tokens of the prompt,
those of the answer, their log-probabilities, and the text.
"""

import itertools
import json
import sys

from vllm import LLM, SamplingParams


def main(chats: str, folder: str, result: str):
    with open(chats, encoding="utf-8") as file:
        asked = json.load(file)
    engine = LLM(folder, trust_remote_code=True, **asked["engine"])
    bias = asked["sampling"].pop("logit_bias", None)  # whose keys JSON turns into text
    bias = bias and {int(token): value for token, value in bias.items()}
    sampling = SamplingParams(temperature=0, logprobs=0, logit_bias=bias, **asked["sampling"])
    found = []
    outputs = (engine.chat(asked["chats"], sampling, use_tqdm=False, mm_processor_kwargs=s) for s in asked["settings"])
    for output in itertools.chain.from_iterable(outputs):
        answer = output.outputs[0]
        found.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(answer.token_ids),
                "logprobs": [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs)],
                "text": answer.text,
            }
        )
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
