# SPDX-License-Identifier: Apache-2.0
"""A mixture as an HTML page: its table and some samples, with their images in the file."""

import base64
import html
import io

from PIL import Image

from processing import HoneybeeProcessor, open_image
from processing.crops_honeybee import WHOLE, Cut
from processing.processing_honeybee import resize_images
from training.recipe.mixture import bad_sample
from training.recipe.texts import rendered

THUMBNAIL = 224
CUT = ", or cut into squares, in the order in which they stand here, the whole picture last"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}h2{margin:2rem 0 .5rem}h2 small{font-weight:normal;color:#777}
article{display:flex;gap:1.2rem;margin:.6rem 0;padding:.8rem;border:1px solid #ddd;border-radius:6px;align-items:start}
figure{margin:0;flex:0 0 160px}img{width:160px;border-radius:3px}figcaption,.none{color:#777;font-size:.8rem;overflow-wrap:anywhere}
.crops{display:grid;gap:2px;margin-bottom:2px}.crops img{width:100%;border-radius:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}mark{background:#bfe8bf;padding:0 .15em;border-radius:3px}
.no{color:#b00}"""


def html_page(
    table: list[list[str]],
    shown: dict[str, list[dict]],
    roots: dict[str, str],
    processor: HoneybeeProcessor | None = None,
) -> str:
    """The page; what is learned is marked in it.

    Args:
        table: of `mixture_table`.
        shown: dataset -> its samples, in the order of the table.
        roots: dataset -> folder of relative image paths.
        processor: whose templates words the samples; ours without one. Where it cuts pictures, their squares are shown.
    """
    head, *rows = [[html.escape(cell) for cell in row] for row in table]
    body = [
        "<!doctype html><meta charset=utf-8><title>Recipe preview</title>",
        f"<style>{STYLE}</style><h1>Recipe preview</h1>",
        "<p>What is learned is <mark>marked</mark>, and so is the end of each marked part. The model sees the images resized to "
        f"its square{CUT if processor and processor.max_crops > 1 else ''}.</p>",
        "<table><tr><th>" + "<th>".join(head) + "".join("<tr><td>" + "<td>".join(row) for row in rows) + "</table>",
    ]
    for (name, samples), (_, task, *_) in zip(shown.items(), rows):
        body.append(f"<h2>{html.escape(name)} <small>{task}</small></h2>")
        for sample in samples:
            figures = "".join(_figures(sample["images"], roots[name], processor)) or '<p class="none">no image</p>'
            text = "".join(
                f"<mark>{html.escape(part)}</mark>" if learned else html.escape(part)
                for part, learned in rendered(sample, processor)
            )
            label = f"<figcaption>sample {sample['index']}</figcaption>"
            body.append(f"<article><figure>{figures}{label}</figure><pre>{text}</pre></article>")
    return "\n".join(body) + "\n"


def _figures(images: list, root: str, processor: HoneybeeProcessor | None) -> list[str]:
    """The images of a sample, those that are cut as the squares that the model sees."""
    opened = []
    for image in images:
        try:
            opened.append(open_image(image, root))
        except Exception as error:  # whatever it is, the page shows it in the image's place
            opened.append(bad_sample(error, "corrupt image"))
    cuts = [WHOLE] * len(images)
    if processor is not None:
        cuts = processor.plan_cuts([image.size if isinstance(image, Image.Image) else (1, 1) for image in opened])
    return [_figure(image, cut, processor) for image, cut in zip(opened, cuts)]


def _figure(image: Image.Image | Exception, cut: Cut, processor: HoneybeeProcessor | None) -> str:
    if isinstance(image, Exception):
        return f'<p class="no">{html.escape(str(image))}</p>'
    if cut == WHOLE:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return _tag(image)
    crops = resize_images([image], processor.image_processor, [cut])
    overview = _tag(crops.pop()) if cut.overview else ""
    tokens = processor.count_image_tokens(processor.num_query_tokens, cut)
    which = f", with M = {processor.num_query_tokens}" if processor.elastic_num_query_tokens else ""
    words = f"{cut.columns} x {cut.rows} crops{' and the whole' if overview else ''}: {cut.num_crops} squares"
    words += f", {tokens:,} visual tokens{which}"
    grid = (
        f'<div class="crops" style="grid-template-columns:repeat({cut.columns},1fr)">{"".join(map(_tag, crops))}</div>'
    )
    return f"{grid}{overview}<figcaption>{words}</figcaption>"


def _tag(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
