# SPDX-License-Identifier: Apache-2.0
"""A chat page about images, with streaming answers.

    python serving/chat_demo.py --model outputs/quickstart/model        # http://127.0.0.1:7860

Several images a message and several turns; an image of an earlier turn stays in the conversation. Needs
`pip install -e ".[serve]"`.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING

from serving.limits import ChatRequest, LimitError, Limits, add_limit_arguments, limits_from

if TYPE_CHECKING:
    from modeling_honeybee import HoneybeeForConditionalGeneration
    from processing import HoneybeeProcessor


def as_messages(message: dict, history: list[dict]) -> tuple[list[dict], list[str]]:
    """Gradio's chat as messages for the processor, and the paths of its images in order.

    Args:
        message: `{"text": str, "files": [path, ...]}`, the new turn.
        history: turns of `{"role": ..., "content": ...}`, content an item (see [`_item`]) or a list of them. A turn
            that was refused stands there without an answer, and is left out.
    """
    messages, paths, unanswered = [], [], []
    for turn in history:
        content = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
        items = [_item(item) for item in content]
        files = [value for kind, value in items if kind == "file"]
        texts = [value for kind, value in items if kind == "text" and value]
        if turn["role"] == "user":
            unanswered += [("image", path) for path in files] + [("text", text) for text in texts]
        elif unanswered and texts:
            messages += [_user(unanswered), {"role": "assistant", "content": "".join(texts)}]
            paths += [value for kind, value in unanswered if kind == "image"]
            unanswered = []
    new = [("image", path) for path in message.get("files") or []]
    new += [("text", message["text"])] if message.get("text") else []
    return [*messages, _user(new)], paths + [value for kind, value in new if kind == "image"]


def _item(item: str | dict) -> tuple[str, str | None]:
    """Kind (text, file or another) and value. The page's history has `{"type": ...}`, that of gradio_client's calls
    plain strings and `{"path": ...}`."""
    if isinstance(item, str):
        return "text", item
    if "type" not in item:
        return "file", item["path"]
    return item["type"], item["file"]["path"] if item["type"] == "file" else item.get("text")


def _user(items: list[tuple[str, str]]) -> dict:
    content = [{"type": "image"} if kind == "image" else {"type": "text", "text": value} for kind, value in items]
    return {"role": "user", "content": content}


class Chat:
    """A model that answers Gradio's chats within limits."""

    def __init__(self, model: "HoneybeeForConditionalGeneration", processor: "HoneybeeProcessor", limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits

    def answer(
        self,
        message: dict,
        history: list[dict],
        num_query_tokens: int | None = None,
        max_crops: int | None = None,
    ) -> Iterator[str]:
        """The answer so far, again and again until it is complete.

        Args:
            num_query_tokens: M of all images of the chat (of their crops); None for the model's default.
            max_crops: the most crops of each image; None for the model's default.

        Raises:
            LimitError: the chat is empty or over a limit; nothing was computed.
        """
        from serving.answer import Answer

        messages, paths = as_messages(message, history)
        if not messages[-1]["content"]:
            raise LimitError("the message is empty; write something or add an image")
        contents = [item for turn in messages for item in turn["content"] if not isinstance(turn["content"], str)]
        characters = sum(len(item.get("text", "")) for item in contents)
        characters += sum(len(turn["content"]) for turn in messages if isinstance(turn["content"], str))
        self.limits.check_counts(len(paths), characters)
        for path in paths:
            self.limits.check_image_size(os.path.getsize(path))  # before it is read
            self.limits.check_image(Path(path).read_bytes())
        asked = {"num_query_tokens": num_query_tokens, "max_crops": max_crops}
        request = ChatRequest(messages, paths, self.limits.max_new_tokens, **asked)
        answer = Answer(self.model, self.processor, request)
        events = Queue()
        Thread(target=answer.run, args=(events.put,)).start()
        text = ""
        try:
            while isinstance(event := events.get(), str):
                text += event
                yield text
        finally:
            answer.cancelled = True  # the page was closed
        if event is not None:
            raise event


def build_page(chat: Chat, title: str):
    """The Gradio page of a [`Chat`]."""
    import gradio

    default, sliders = chat.processor.num_query_tokens, {}
    trained = sorted({*chat.processor.trained_num_query_tokens, default})
    most_crops = chat.processor.max_crops

    def nearest(number: float) -> int:
        return min(trained, key=lambda one: abs(one - number))

    if len(trained) > 1:
        label = f"Visual tokens {'an image' if most_crops == 1 else 'a crop'}: {', '.join(map(str, trained))}"
        sliders["num_query_tokens"] = gradio.Slider(
            trained[0],
            trained[-1],
            default,
            step=1,
            label=label,
            info="The nearest of these is used.",
            render=False,
        )
    if most_crops > 1:
        sliders["max_crops"] = gradio.Slider(
            1, most_crops, most_crops, step=1, label="Crops an image, at most", info="1: none is cut.", render=False
        )

    def answer(message, history, *values):
        asked = {name: nearest(value) if name == "num_query_tokens" else value for name, value in zip(sliders, values)}
        try:
            yield from chat.answer(message, history, **asked)
        except LimitError as error:
            raise gradio.Error(str(error), title="Not taken", print_exception=False) from error

    limits = chat.limits
    page = gradio.ChatInterface(
        answer,
        multimodal=True,
        textbox=gradio.MultimodalTextbox(
            file_types=["image"], file_count="multiple", placeholder="Add images and ask about them", label="Message"
        ),
        additional_inputs=list(sliders.values()),
        additional_inputs_accordion=gradio.Accordion("Visual tokens", open=True),
        title=title,
        description=f"Up to {limits.max_images} images of {limits.max_image_bytes / 1e6:g} MB and "
        f"{limits.max_image_pixels / 1e6:g} megapixels, and {limits.max_prompt_chars:,} characters a chat.",
    )
    if slider := sliders.get("num_query_tokens"):
        with page:
            slider.release(nearest, slider, slider, show_progress="hidden", api_visibility="private")
    return page


def main():
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or Hub name of a Honeybee model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument("--device", help="cuda, cpu, cuda:1 ... (default: cuda where there is one)")
    add_limit_arguments(parser)
    args = parser.parse_args()
    if find_spec("gradio") is None:
        sys.exit('error: the chat page needs gradio; install with: pip install -e ".[serve]"')
    try:
        limits = limits_from(args)
        # Only here: these load for seconds.
        import torch

        from modeling_honeybee import HoneybeeForConditionalGeneration
        from modeling_honeybee.model_folder import model_folder
        from modeling_honeybee.processes import use_attention_for_any_shape
        from processing import HoneybeeProcessor, check_processor

        use_attention_for_any_shape()
        folder = model_folder(args.model)
        model = HoneybeeForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
        model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        processor = HoneybeeProcessor.from_pretrained(folder)
        check_processor(model.config, processor)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    page = build_page(Chat(model, processor, limits), f"Honeybee: {Path(args.model).name}")
    page.launch(
        server_name=args.host, server_port=args.port, share=False, max_file_size=limits.max_image_bytes, footer_links=[]
    )


if __name__ == "__main__":
    main()
