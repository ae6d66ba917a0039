"""A page in the browser: draw pictures at numbers, read numbers from a picture, or from many.

    python gradio_control.py                                  # pairs, with the control that ships
    python gradio_control.py model_path=models/control_tiny   # or any out_dir of a training

Needs what `make page` installs, and prints the address to open. What visitors upload lies in a folder of its own, goes
after keep_minutes, and with the page, which Ctrl-C ends; what they are shown is written nowhere.
"""

from ldm.settings import InputError, answer, check_numbers, explain, run_script

settings = dict(
    model_path="models/control_tiny_pair",  # the out_dir of a training
    examples=["dataForTrain/demo/prompt.json", "dataForTrain/prompt.json"],  # rows to click, where they fit
    address="127.0.0.1",  # this machine alone; 0.0.0.0: whoever reaches it
    port=7860,
    max_upload_mb=50.0,  # of one file
    max_megapixels=50.0,  # of one picture
    max_pictures=1000,  # read at once
    keep_minutes=60,  # that an upload is kept
    a_prompt=None,  # added to the prompt; None: as the base's YAML says
    ddim_steps=8,  # of a drawing, so that it follows the slider
    count=7,  # pictures of a strip
    draws=8,  # of noise, in pairs, for a reading
    seed=0,  # of readings, and the first of drawings
    device="auto",  # a GPU where there is one
)
if __name__ == "__main__":
    answer(__file__)

import math
import os
import re
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from cldm import page
from cldm.dataset import iterate_rows
from cldm.model import load_model
from cldm.reading import search_bounds
from cldm.report import label
from ldm.files import find_path
from ldm.schema import TEXT, each, expect

try:
    import gradio as gr
except ImportError:
    gr = None

EXAMPLES = 12  # at most
CSS = """
main {width: 100%; max-width: 1200px !important; margin: auto !important}
figure {margin: 12px 0; text-align: center} figure img {margin: auto; max-width: 100%}
.drawing figure img {width: 384px; border-radius: 4px} figcaption {margin-top: 6px; font-size: 14px}
.scroll {overflow: auto; max-height: 480px} .scroll table {width: 100%; border-collapse: collapse}
.scroll tr {border-bottom: 1px solid #8884}
.scroll th, .scroll td {padding: 4px 12px; text-align: left; border: 0 !important; white-space: nowrap}
.flag, .wrong {border-left: 4px solid #D55E00; padding: 4px 12px; margin: 8px 0} .wrong {font-weight: bold}
.fine {border-left: 4px solid #0072B2; padding: 4px 12px; margin: 8px 0} progress {width: 240px}
.offer {display: inline-block; margin: 8px 8px 0 0; padding: 4px 12px; border: 1px solid #8888; border-radius: 4px}
"""


def find_examples(s, model):
    """Returns: Rows of s.examples that the control can draw and read, one a prompt, at different numbers."""
    config, found = model.control_net.config, {}
    for file in s.examples:
        for row in iterate_rows(find_path(file)):
            fits = row.prompt in (config.prompts or ()) and len(row.control) == len(config.control_names)
            if fits and bool(row.reference) == model.control_net.uses_reference:
                found.setdefault(row.prompt, []).append(row)
    return [rows[3 * i % len(rows)] for i, rows in enumerate(found.values())][:EXAMPLES]


def serve(s, worker, function):
    """Returns: a generator of `function` as the page calls it: every step in the one thread that computes, so that
    visitors take turns; an error that is not the program's as the line that a script would end with."""
    paths = re.compile(rf"{re.escape(s.uploads)}/\w+/")  # a visitor knows only the name

    def handle(*inputs):
        steps = function(*inputs)
        try:
            while (html := worker.submit(next, steps, None).result()) is not None:
                yield html
        except Exception as error:
            if not (line := explain(error, s)):
                raise
            yield page.tell_error(paths.sub("", line))
        finally:
            steps.close()

    return handle


def receive(s, own, payload):
    """payload: of a picture's component. own: paths of the page's own pictures. Returns: its path, or None.

    Raises: InputError for any other file of this machine, which gradio lets a visitor name.
    """
    if not payload:
        return None
    path = Path(payload.path or "").resolve()
    if path not in own and not path.is_relative_to(Path(s.uploads).resolve()):
        raise InputError("a picture that was not uploaded; drop one, or click an example")
    return str(path)


def make_sliders(config, start):
    """Returns: a slider for each number over the range that is searched, the trained one marked; its CSS."""
    sliders, css = [], ""
    for k, (low, high) in enumerate(search_bounds(config).T.tolist()):
        name, unit, period = config.control_names[k], config.control_units[k], config.periods[k]
        trained = f"trained: {config.control_low[k]:g} to {config.control_high[k]:g} {unit}"
        if period:
            low, high, trained = low - period / 4, high + period / 4, f"goes round after {period:g} {unit}"
        digits = 2 - math.floor(math.log10(high - low))
        low, high = round(low, digits), round(high, digits)
        more = dict(step=10.0**-digits, value=round(start[k], digits), elem_id=f"number-{k}", info=trained)
        sliders.append(gr.Slider(low, high, label=label(name, unit), **more))
        left, right = ((end - low) / (high - low) for end in (config.control_low[k], config.control_high[k]))
        band = f"linear-gradient(to right, #0000 {left:.1%}, #0072B2 {left:.1%} {right:.1%}, #0000 {right:.1%})"
        css += f"#number-{k} input[type=range] {{background: {band} bottom/100% 3px no-repeat; padding-bottom: 7px}}"
    return sliders, css


def build(s, model, examples, worker):
    """Returns: the page, gr.Blocks; its CSS."""
    config, uses_reference = model.control_net.config, model.control_net.uses_reference

    def handle(function):
        return serve(s, worker, partial(function, model, s))

    first, prompts = examples[0] if examples else None, list(config.prompts or [""])
    own = {file.resolve() for row in examples for file in row.pictures}
    start = first.control if first else config.control_mean

    def make_prompt():
        shown = not uses_reference or any(prompts)
        value = first.prompt if first else prompts[0]
        return gr.Dropdown(prompts, value=value, label="prompt", allow_custom_value=True, visible=shown)

    def make_picture(label, **options):
        picture = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=300, **options)
        picture.preprocess = partial(receive, s, own)  # undecoded: load_picture is what decodes it
        return picture

    def make_reference(**options):
        return make_picture("A: before the change", visible=uses_reference, **options)

    how, keep = dict(trigger_mode="always_last", show_progress="hidden"), (60, 60 * s.keep_minutes)
    blocks = gr.Blocks(title="ControlNetYRT", fill_width=True, analytics_enabled=False, delete_cache=keep)
    with blocks:
        gr.Markdown(f"# ControlNetYRT\n{', '.join(config.control_names)}, by `{s.model_path}`")
        with gr.Tab("Draw"):
            with gr.Row():
                with gr.Column():
                    reference = make_reference(value=first and first.reference and str(first.reference))
                    prompt, (sliders, css) = make_prompt(), make_sliders(config, start)
                    seed = gr.Number(s.seed, label="seed of the noise", precision=0)
                with gr.Column():
                    drawing = gr.HTML(elem_classes="drawing")
                    over = gr.Dropdown(
                        list(config.control_names), label="the strip goes over", visible=len(sliders) > 1
                    )
                    draw_strip = gr.Button("Strip over the trained range")
            strip, given = gr.HTML(min_height=80), [prompt, reference, seed]
            drawn = [blocks.load, prompt.change, reference.change, seed.change, *(slider.input for slider in sliders)]
            gr.on(drawn, handle(page.draw), [*given, *sliders], drawing, api_name="draw", **how)
            for k, slider in enumerate(sliders):
                if config.periods[k]:  # back into its circle, where it means the same
                    go_round = partial(lambda k, *numbers: page.to_control(model, numbers)[0, k].item(), k)
                    slider.release(go_round, sliders, slider, show_progress="hidden", api_visibility="private")
            draw_strip.click(handle(page.draw_range), [*given, over, *sliders], strip, api_name="strip")
        with gr.Tab("Read"):
            with gr.Row():
                reference = make_reference()
                target = make_picture("B: after it" if uses_reference else "picture")
            prompt = make_prompt()
            several = dict(placeholder=f"{config.control_names[-1]}=0", visible=len(sliders) > 1)
            known = gr.Textbox(label="numbers that are known, and need not be found", **several)
            button, reading = gr.Button("Read", variant="primary"), gr.HTML(min_height=80, render=False)
            wanted, read = [reference, target, prompt, known], handle(page.read_picture)
            if examples:
                rows = [[row.reference and str(row.reference), str(row.target), row.prompt, ""] for row in examples]
                shown = dict(
                    visible_columns=[0, 1] if uses_reference else [1, 2],
                    label="Click one to read it",
                    examples_per_page=4,
                )
                gr.Examples(rows, wanted, reading, read, run_on_click=True, cache_examples=False, **shown)
            reading.render()
            button.click(read, wanted, reading, api_name="read")
        with gr.Tab("Many"):
            with gr.Row():
                files = gr.File(label="pictures, or a zip of them and perhaps a prompt.json", file_count="multiple")
                folder = gr.File(label="or a folder", file_count="directory")
            reference, prompt = make_reference(), make_prompt()
            with gr.Row():
                button, stop = gr.Button("Read all", variant="primary"), gr.Button("Stop")
            table = gr.HTML(min_height=80)
            reading = button.click(handle(page.read_many), [files, folder, reference, prompt], table, api_name="many")
            stop.click(None, cancels=reading)
    return blocks.queue(max_size=64), css


def main(s):
    check_numbers(s, int, port=(1, 65535), ddim_steps=(1, 1000), count=(2, 100), draws=(4, 1000), seed=(0, 2**63 - 1))
    check_numbers(s, int, max_pictures=(1, math.inf), keep_minutes=(1, math.inf))
    check_numbers(s, max_upload_mb=(0.001, math.inf), max_megapixels=(0.001, math.inf))
    expect('setting "examples": expected', s.examples, each(TEXT))
    if gr is None:
        raise InputError("gradio is not installed: start the page with `make page`, or install requirements-page.txt")
    Image.MAX_IMAGE_PIXELS = int(1e6 * s.max_megapixels / 2)  # Pillow refuses what has twice as many
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed then too
    with tempfile.TemporaryDirectory(prefix="page-") as s.uploads, ThreadPoolExecutor(1) as worker:
        os.environ["GRADIO_TEMP_DIR"] = s.uploads
        # In the thread that will compute: OpenMP serves a second one that computes a quarter slower.
        model = worker.submit(load_model, s.model_path, device=s.device).result()
        examples = find_examples(s, model)
        blocks, css = build(s, model, examples, worker)
        where = dict(server_name=s.address, server_port=s.port, max_file_size=int(1e6 * s.max_upload_mb))
        looks = dict(theme=gr.themes.Default(font=["system-ui", "sans-serif"]), css=CSS + css, footer_links=[])
        try:
            blocks.launch(
                share=False, allowed_paths=[str(file) for row in examples for file in row.pictures], **where, **looks
            )
        except OSError as error:
            remedy = "it may be taken; give another port=…, and an address of this machine"
            raise InputError(f"{s.address}:{s.port}: cannot be listened on ({error}); {remedy}") from None


if __name__ == "__main__":
    run_script(main, settings)
