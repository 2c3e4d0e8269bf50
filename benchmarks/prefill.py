# SPDX-License-Identifier: Apache-2.0
"""What the number of visual tokens M costs: time until the first answer token, for one image and a short question.

    python -m benchmarks.prefill

M = 576 is what a linear projector keeps of a 336 px image of CLIP-L/14. The LLM is small but wide enough that its layers are
most of the work, as in a 7B model; `LLM` is its time alone, `all` has tower and projector in it. The settings take turns.
"""

import json

import torch

from benchmarks.measure import arguments, build, in_turn, machine, markdown

TEXT = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
QUESTION = 30  # tokens of prompt and question around the image
MS = (64, 144, 256, 576)


def main():
    args = arguments(__doc__, rounds=7)
    functions = {}
    for number in MS:
        projector = {"projector_type": "c-abs", "num_query_tokens": number, "hidden_size": 128}
        vision = {**VISION, "image_size": 336, "patch_size": 14}
        model = build({**TEXT, "vocab_size": 1000, "max_position_embeddings": 1024}, vision, projector, 999).eval()
        input_ids = torch.cat([torch.full((number,), 999), torch.arange(QUESTION)])[None]
        pixel_values = torch.zeros(1, 3, 336, 336)
        embeddings = torch.randn(1, number + QUESTION, TEXT["hidden_size"])

        @torch.no_grad()
        def everything(model=model, input_ids=input_ids, pixel_values=pixel_values):
            model(input_ids=input_ids, pixel_values=pixel_values, logits_to_keep=1)

        @torch.no_grad()
        def language_model(model=model, embeddings=embeddings):
            model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1:])

        functions |= {(number, "LLM"): language_model, (number, "all"): everything}
    times = in_turn(functions, args.rounds)
    ratios = {number: {part: times[576, part] / times[number, part] for part in ("LLM", "all")} for number in MS}
    if args.json:
        print(json.dumps(ratios))
        return
    rows = [
        {"M": number, "LLM": f"{times[number, 'LLM'] * 1e3:.0f} ms", "LLM, faster than M = 576": f"{ratios[number]['LLM']:.2f} x",
         "all": f"{times[number, 'all'] * 1e3:.0f} ms", "all, faster than M = 576": f"{ratios[number]['all']:.2f} x"}
        for number in MS
    ]  # fmt: skip
    print(f"{QUESTION} tokens of text. {machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
