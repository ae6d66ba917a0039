"""How long the page takes, and whether visitors at once get their own: what docs/page.md says.

    python benchmarks/page.py    # about two minutes on two cores

Needs what `make page` and benchmarks/requirements.txt install. Starts the page as `make page` does and asks it as a
browser would. Seconds are those of the clock, and of the page's process on all cores: where others compute beside it,
the second are what it needs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    port=7871,
    repeats=10,  # drawings and readings, after a first one
    requests=50,  # drawings at once
    clients=4,
    seed=0,
)
if __name__ == "__main__":
    answer(__file__)

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from gradio_client import Client, handle_file
from tqdm import tqdm

import invert
from cldm.dataset import read_rows
from cldm.model import load_model
from cldm.page import to_png
from cldm.readers import load, read
from ldm.files import ROOT
from ldm.settings import override

ROW = read_rows(ROOT / "dataForTrain" / "demo" / "prompt.json")[0]


def spent(process):
    """Returns: seconds of the clock, and of a process on all cores."""
    return np.array([time.perf_counter(), sum(process.cpu_times()[:2])])


def timed(process, function, count=1):
    """Returns: what function() returns; seconds of the clock and of a process, medians of `count` calls."""
    marks = [spent(process)]
    for _ in range(count):
        result = function()
        marks.append(spent(process))
    return result, np.median(np.diff(marks, axis=0), axis=0)


def tell(what, seconds):
    print(f"| {what} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)


def connect(s, process):
    """Returns: a client of the page, once it answers."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            return Client(f"http://127.0.0.1:{s.port}", verbose=False)
        except Exception:  # httpx raises many kinds while nobody listens
            time.sleep(0.1)
    sys.exit("the page did not start")


def main(s):
    check_numbers(s, int, repeats=(1, 1000), requests=(1, 1000), clients=(1, 64), seed=(0, 2**63 - 1))
    began = time.perf_counter()
    command = [sys.executable, ROOT / "gradio_control.py", f"port={s.port}"]
    process = psutil.Process(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)
    try:
        client, a, b = connect(s, process), handle_file(ROW.reference), handle_file(ROW.target)

        def draw(rotation, client=client):
            html = client.submit("", a, s.seed, rotation, *ROW.control[1:], api_name="/draw").result()
            return re.search(r'src="([^"]+)"', html)[1]

        draw(0.0)
        print("| | seconds | of all cores |\n| --- | --- | --- |")
        tell("from the start to the first drawing", spent(process) - [began, 0])
        tell("a drawing", timed(process, lambda: draw(1.0), s.repeats)[1])
        ask = lambda: client.submit(a, b, "", "", api_name="/read").result()  # noqa: E731
        ask()
        here, model, own = psutil.Process(), load_model("models/control_tiny_pair"), override(invert.settings, [])

        def bare():
            _, figure = read(model, own, {}, [ROW], [load(ROW, model.config.image_size)], figures=True)
            return to_png(figure(0).savefig)

        bare()
        both = [(timed(process, ask)[1], timed(here, bare)[1]) for _ in range(s.repeats)]
        for what, seconds in zip(("a reading, with its figure", "the same in invert.py"), np.median(both, axis=0)):
            tell(what, seconds)

        clients = [connect(s, process) for _ in range(s.clients)]
        rotations = np.linspace(-10, 10, s.requests).tolist()
        alone = [draw(rotation) for rotation in tqdm(rotations, delay=1, leave=False)]
        held = process.memory_info().rss
        with ThreadPoolExecutor(s.clients) as pool:
            together = pool.map(lambda i: draw(rotations[i], clients[i % s.clients]), range(s.requests))
            mixed = sum(one != other for one, other in zip(together, alone))
        grown = (process.memory_info().rss - held) / 1e6
        print(f"\n{s.requests} drawings for {s.clients} clients at once: {mixed} unlike those asked for one by one")
        print(f"memory after them: {grown:+.0f} MB, of {held / 1e6:.0f}")
    finally:
        process.terminate()


if __name__ == "__main__":
    run_script(main, settings)
